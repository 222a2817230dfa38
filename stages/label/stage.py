"""The label stage: from ratios to tau to keep or compress, for every tile.

It is cheap, so floor, percentile and window are in its config and not in that of the ratio stage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from stages.context import Context
from stages.label.config import LabelConfig
from stages.outputs import LABELS_FILE, METRICS_FILE, RATIOS_FILE
from vico.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


CODE_VERSION = 2
INPUTS = ("ratio",)
NEEDS_RAY = False
Config = LabelConfig
TAU_MARGIN = 0.05
"""Tiles within this share of their tau are counted as near it."""


class LabelMetrics(TypedDict):
    """How stable the labels are and what they compress."""

    tiles: int
    share_compressed: float
    share_near_tau: float
    share_changed_at_third_floor: float
    share_changed_at_triple_floor: float
    share_compressed_by_split: dict[str, float]
    share_compressed_by_kind: dict[str, float]


def run(config: LabelConfig, context: Context) -> dict[str, float | int | str]:
    """Publish `labels.parquet`, `metrics.json` and a plot of losses and ratios by kind of content."""
    import pyarrow.parquet as pq

    from stages.figures import publish_figure
    from stages.label.figure import losses_by_kind
    from stages.losses_policy import with_policy_of
    from stages.ratio_scale import with_floor

    path = context.folder("ratio") / RATIOS_FILE
    ratios = pq.read_table(path)
    labels, last_tau = label_table(ratios, config, config.floor, str(path))
    check_both_labels(labels, str(path))
    marked = with_floor(with_policy_of(labels, ratios), ratios, config.floor)
    pq.write_table(marked, context.parts.partial(LABELS_FILE))
    context.parts.publish(LABELS_FILE, replace=True)
    metrics = label_metrics(ratios, labels, config, str(path))
    values = {"last_tau": last_tau, **metrics}
    context.parts.write_json(METRICS_FILE, values)
    publish_figure(context, "losses_by_kind", losses_by_kind(ratios, labels))
    context.log({name: value for name, value in values.items() if isinstance(value, float)}, 0)
    return {"tiles": len(labels), "share_compressed": metrics["share_compressed"]}


def label_table(ratios: pa.Table, config: LabelConfig, floor: float, path: str) -> tuple[pa.Table, float]:
    """Return the table of labels, in the order of the ratios, and the last tau of train.

    Train tiles are labelled in an order drawn by seed; the tau of each is the percentile of the window that
    ends with it. Tiles of the other splits are compared with the last tau of train and do not change it.
    Raises UserError if there are no train tiles or a ratio is not finite; `path` is named in it.
    """
    import numpy as np
    import pyarrow as pa

    from data_prep.draws import draw_order
    from vico.objectives.labels import loss_ratio, tile_labels, window_percentiles

    with np.errstate(invalid="ignore", divide="ignore"):  # floor 0 over a loss of 0 is refused below
        ratio = loss_ratio(ratios["loss_compressed"].to_numpy(), ratios["loss_full"].to_numpy(), floor)
    if not np.isfinite(ratio).all():
        first = int(np.flatnonzero(~np.isfinite(ratio))[0])
        raise UserError(
            f"{path}: tile {ratios['tile'][first]} of {ratios['key'][first]} has ratio {ratio[first]} with "
            f"label.floor={floor}; set a floor above 0, or check the losses of the ratio stage"
        )
    train = np.flatnonzero(np.asarray(ratios["split"].to_pylist()) == "train")
    if not len(train):
        raise UserError(
            f"{path} has no tiles of the split train; lower shard.calib_share and shard.test_share"
        )
    order = train[draw_order("label order", config.seed, np.arange(len(train)))]
    taus = window_percentiles(ratio[order], config.percentile, config.window_tiles)
    tau = np.full(len(ratio), taus[-1])
    tau[order] = taus
    columns = {name: ratios[name] for name in ("key", "split", "image", "tile")}
    labels = pa.table({**columns, "ratio": ratio, "tau": tau, "label": tile_labels(ratio, tau)})
    return labels, float(taus[-1])


def check_both_labels(labels: pa.Table, path: str) -> None:
    """Raise UserError if all train tiles have the same label, from which no router learns anything."""
    import pyarrow.compute as pc

    train = labels.filter(pc.equal(labels["split"], "train"))
    if pc.count_distinct(train["label"]).as_py() > 1:
        return
    ends = pc.min_max(train["ratio"])
    raise UserError(
        f"{path}: all {len(train)} train tiles get the label compress, as no ratio is above its tau (ratios "
        f"{ends['min'].as_py():.6g} to {ends['max'].as_py():.6g}); give more train tiles, lower "
        "label.percentile, or lower label.floor if ratios are equal because of it"
    )


def label_metrics(ratios: pa.Table, labels: pa.Table, config: LabelConfig, path: str) -> LabelMetrics:
    """Return the shares of tiles that are compressed, near tau, or changed by another floor."""
    import numpy as np

    from vico.objectives.labels import COMPRESS, share_near_tau

    label = labels["label"].to_numpy()
    compressed = label == COMPRESS

    def share_changed(floor: float) -> float:
        others, _ = label_table(ratios, config, floor, path)
        return float(np.mean(others["label"].to_numpy() != label))

    return {
        "tiles": len(labels),
        "share_compressed": float(compressed.mean()),
        "share_near_tau": share_near_tau(labels["ratio"].to_numpy(), labels["tau"].to_numpy(), TAU_MARGIN),
        "share_changed_at_third_floor": share_changed(config.floor / 3),
        "share_changed_at_triple_floor": share_changed(config.floor * 3),
        "share_compressed_by_split": _shares(labels["split"], compressed),
        "share_compressed_by_kind": _shares(ratios["kind"], compressed),
    }


def _shares(names: pa.ChunkedArray, compressed: np.ndarray) -> dict[str, float]:
    """Return the share of compressed tiles by name, sorted, in one pass."""
    import pyarrow as pa

    table = pa.table({"name": names, "compressed": compressed})
    shares = table.group_by("name").aggregate([("compressed", "mean")])
    columns = (shares[column].to_pylist() for column in ("name", "compressed_mean"))
    return dict(sorted(zip(*columns, strict=True)))
