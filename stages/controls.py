"""The controls of the evaluation: each way to choose the compressed tiles, its key in metrics.json and its
look.

Points, scores, intervals, table, plots and the model card read this file. Importing it is light.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from stages.palette import AMBER, BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY

ControlName = Literal["random", "shuffled", "pixel_rule", "blind_oracle", "oracle", "fewer_tiles"]
"""The controls that `evaluate.controls` may name."""
TileMeasure = Literal["p_compress_N", "pixel_score_N", "ratio_N", "blind_ratio_N"]
"""The fields of EvaluatedTiles that a control may order the tiles by."""


class PointMetrics(TypedDict):
    """One measured point in metrics.json; means over samples and replicates, shares between 0 and 1."""

    threshold: NotRequired[float]
    max_tiles: NotRequired[int]
    share_compressed: float
    visual_tokens: float
    tokens_saved: float
    exact_match: float
    similarity: float
    kl: float | None
    quality_kept: float | None
    truncated: float
    similarity_sd: NotRequired[float]
    quality_kept_interval: NotRequired[list[float] | None]
    exact_match_interval: NotRequired[list[float] | None]


@dataclass(frozen=True)
class Control:
    """One way to choose the compressed tiles; the router and both ends are measured and shown like one."""

    name: str
    """Its key in metrics.json."""
    label: str
    """Its name in tables and legends."""
    colour: str
    is_listed: bool = True
    """Whether metrics.json has a list of its points; the others have one point."""
    line: str = "-"
    """The style of its curve, in matplotlib's notation."""
    marker: str = "o"
    marker_area: float = 48
    """In square points, for a point that is drawn without a curve."""
    has_band: bool = False
    """Whether the interval of its quality is drawn as a band around its curve."""
    is_random: bool = False
    """Whether tiles are drawn by seed: its points are means over `evaluate.num_replicates` draws."""
    needs: TileMeasure = "p_compress_N"
    """Without this measure of the tiles it has no points."""
    rule: str = ""
    """Its name in the model card, if it is a rule that a user can serve."""
    is_shown: bool = True
    """Whether tables and plots show it; if not, only the statistics use it."""
    is_bound: bool = False
    """It knows the loss ratios of the test tiles: a bound, which no router has to beat."""
    has_low_end: bool = True
    """Whether its curve ends where all tiles are compressed."""


REFERENCE = Control("reference", "reference (start model, full rate)", BLACK, is_listed=False, line=":")
FULL = Control("full", "trained, all tiles at the full rate", BLACK, is_listed=False, marker="s")
COMPRESSED = Control("compressed", "trained, all tiles at the low rate", BLUE, is_listed=False, marker="s")
ROUTED = Control("routed", "router", ORANGE, marker="D", marker_area=75, has_band=True, rule="ours")
SERVED = Control(
    "served", "published rule, one prompt per call", BLACK, marker="X", marker_area=70, rule="served"
)
RANDOM = Control("random", "random tiles", GREY, line="--", has_band=True, is_random=True)
SHUFFLED = Control("shuffled", "router, decisions shuffled", SKY, line=":", is_random=True)
PIXEL_RULE = Control("pixel_rule", "pixel rule", PINK, line="-.", needs="pixel_score_N")
ORACLE = Control(
    "oracle",
    "oracle (the tiles' own ratios)",
    GREEN,
    line="--",
    has_band=True,
    needs="ratio_N",
    is_bound=True,
)

BLIND_ORACLE = Control(
    "blind_oracle",
    "blind oracle (ratios of other questions)",
    AMBER,
    line="-.",
    needs="blind_ratio_N",
    is_bound=True,
)
SEEING_ORACLE = Control(
    "seeing_oracle",
    "oracle on the tiles of the blind oracle",
    GREEN,
    needs="blind_ratio_N",
    is_shown=False,
    is_bound=True,
)
"""The oracle on the same tiles as the blind one, so that both can be compared."""
FEWER_TILES = Control("fewer_tiles", "fewer tiles, full rate", BLUE, line="-.", has_low_end=False)

COMPARED = (RANDOM, SHUFFLED, PIXEL_RULE, BLIND_ORACLE, SEEING_ORACLE, ORACLE)
"""Controls that are compared with the router at the same tokens, in the order of tables and legends."""
LISTED = (ROUTED, SERVED, *COMPARED, FEWER_TILES)
"""Those with lists of points, in the order of metrics.json."""
ALL = (REFERENCE, FULL, COMPRESSED, *LISTED)
BY_NAME = {control.name: control for control in ALL}


def points_of(metrics: Mapping[str, Any], control: Control) -> list[PointMetrics]:
    """Return a list of the control's points in metrics.json, also if there is only one."""
    return metrics[control.name] if control.is_listed else [metrics[control.name]]


def point_of(metrics: Mapping[str, Any], control: Control) -> PointMetrics:
    """Return the single point of REFERENCE, FULL or COMPRESSED."""
    (point,) = points_of(metrics, control)
    return point


def calibrated_points(metrics: Mapping[str, Any]) -> list[PointMetrics]:
    """Return the router's point at its calibrated threshold, in a list."""
    threshold = metrics["absolute_threshold"]
    return [point for point in points_of(metrics, ROUTED) if point.get("threshold") == threshold]


def resampled_units(basis: Mapping[str, Any]) -> str:
    """Return what was resampled for the intervals, from the entry `intervals` of metrics.json, and how many
    groups the samples come from if their records state groups. Samples that share pictures count as one
    picture."""
    num_units, num_groups = basis["num_units"], basis["num_groups"]
    if basis["unit"] == "group":
        num_single = num_units - num_groups
        rest = f" and {num_single:,} picture{'s' * (num_single > 1)} without a group" if num_single else ""
        return f"{num_groups:,} groups{rest}"
    groups = f"{num_groups:,} group{'s' * (num_groups > 1)}"
    units = f"{num_units:,} {basis['unit']}s"
    return units + (f" (the samples come from {groups})" if num_groups else "")
