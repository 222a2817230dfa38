"""Which figures the evaluate stage publishes, and the sheet of routed test pictures among them."""

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from data_prep.shards.reader import SampleReader
from stages.context import Context
from stages.evaluate.plots import quality_against_tokens, ratios_by_content, read_curves, training_curves
from stages.evaluate.points import EvaluatedTiles
from stages.evaluate.scores import rate_text
from stages.figures import publish_figure
from vico.inference.routed_picture import COMPRESS_COLOUR, KEEP_COLOUR, routed_picture
from vico.inference.routing import absolute_rule
from vico.prompt import load_prompt_format

_TITLE_COLUMNS = 52


def draw_evaluation(
    context: Context,
    samples: pa.Table,
    tiles: EvaluatedTiles,
    contents: Sequence[str | None],
    predictions: pa.Table,
    metrics: dict,
) -> None:
    """Publishes `figures/*.png`; `contents` says of each tile what it shows, or None."""
    publish_figure(context, "quality_against_tokens", quality_against_tokens(metrics))
    publish_figure(
        context, "training_curves", training_curves(read_curves(context, ("consistency", "router")))
    )
    if tiles.ratio_N is not None and len(tiles.ratio_N):
        kinds = samples["kind"].to_pylist()
        by_tile = [kind for kind, count in zip(kinds, tiles.num_tiles_S, strict=True) for _ in range(count)]
        groups = [("Test tiles by what they show", contents), ("Test tiles by kind of record", by_tile)]
        publish_figure(context, "ratios_by_content", ratios_by_content(tiles.ratio_N, groups))
    pictures = routed_pictures(context, samples, tiles, predictions, metrics["absolute_threshold"])
    if pictures:
        tokens = metrics["tokens_a_tile"]
        legend = (
            (f"kept at the full rate, {tokens['full']} tokens", _fractions(KEEP_COLOUR), ""),
            (f"compressed to {tokens['compressed']} tokens", _fractions(COMPRESS_COLOUR), "////"),
        )
        publish_figure(context, "routed_pictures", picture_sheet(pictures, legend))


def routed_pictures(
    context: Context, samples: pa.Table, tiles: EvaluatedTiles, predictions: pa.Table, threshold: float
) -> list[tuple[str, Any]]:
    """(kind, question and answers; first picture with its routed tiles) of some test samples, the kinds by
    turns.
    """
    reader = SampleReader(context.inputs["shard"], load_prompt_format(context.inputs["model"]))
    routed = tiles.by_sample(absolute_rule(torch.from_numpy(tiles.p_compress_N), threshold).numpy())
    settings = reader.prompt_format.settings
    numbers = _shown_samples(samples, tiles)
    answers = _answers({samples["key"][s].as_py(): rate_text(routed[s]) for s in numbers}, predictions)
    found = []
    for s in numbers:
        entry = reader.index.row(samples["row"][s].as_py())
        image = reader.pictures(samples["row"][s].as_py())[0]
        decisions = routed[s][: entry["tiles"][0]].tolist()
        drawn = routed_picture(image, settings.tiling(entry["max_tiles"]), settings, decisions)
        found.append((_title(entry["kind"], answers[entry["key"]]), drawn))
    return found


def _shown_samples(samples: pa.Table, tiles: EvaluatedTiles) -> list[int]:
    """Numbers of the samples on the sheet: a kind after the other, then again; pictures of several tiles
    first, since a routing of one tile shows little.
    """
    by_kind: dict[str, list[int]] = defaultdict(list)
    for s, (kind, shapes) in enumerate(zip(samples["kind"].to_pylist(), tiles.tiles_per_image, strict=True)):
        if shapes:
            by_kind[kind].append(s)
    ordered = [sorted(by_kind[kind], key=lambda s: tiles.num_tiles_S[s] == 1) for kind in sorted(by_kind)]
    turns = [s for turn in zip_longest(*ordered) for s in turn if s is not None]
    return sorted(turns[:SHEET_PICTURES], key=lambda s: samples["kind"][s].as_py())


def _answers(rates_by_key: dict[str, str], predictions: pa.Table) -> dict[str, dict]:
    """The policy's answer of each key at the given rates."""
    columns = ("key", "model", "rates", "question", "answer", "prediction", "similarity")
    rows = zip(*(predictions[name].to_pylist() for name in columns), strict=True)
    found = (dict(zip(columns, row, strict=True)) for row in rows)
    return {
        one["key"]: one
        for one in found
        if one["model"] == "policy" and rates_by_key.get(one["key"]) == one["rates"]
    }


def _title(kind: str, answer: dict) -> str:
    def short(text: str, width: int) -> str:
        return textwrap.shorten(text, width, placeholder=" ...")

    said, expected = (short(answer[name], 30) for name in ("prediction", "answer"))
    verdict = "right" if answer["similarity"] == 1 else f"expected: {expected}"
    return f"{kind}: {short(answer['question'], _TITLE_COLUMNS - len(kind))}\n{said} ({verdict})"


def _fractions(colour: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(level / 255 for level in colour)


SHEET_PICTURES, SHEET_COLUMNS = 12, 3


def picture_sheet(pictures: Sequence[tuple[str, Any]], legend: Sequence[tuple[str, Any, str]]) -> Figure:
    """(title, picture) pairs on a grid, as wide in each cell as the cell allows.

    `legend` is (label, colour, hatch) of each mark.
    """
    num_rows = max(1, -(-len(pictures) // SHEET_COLUMNS))
    figure = Figure(figsize=(4.4 * SHEET_COLUMNS, 3.7 * num_rows + 0.5), layout="constrained")
    grid = figure.subplots(num_rows, SHEET_COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (title, picture) in zip(grid, pictures, strict=False):
        axes.imshow(np.asarray(picture), interpolation="lanczos")
        axes.set_anchor("NW")
        axes.set_title(title, fontsize=9, loc="left", parse_math=False)
    keys = [
        Patch(facecolor="white", edgecolor=colour, hatch=hatch, linewidth=2, label=label)
        for label, colour, hatch in legend
    ]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), fontsize=11, frameon=False)
    return figure
