"""Publish the plots of the evaluate stage, among them the sheet of routed test pictures."""

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from data_prep.shards.reader import SampleReader
from stages.context import Context
from stages.evaluate.plots import quality_against_tokens, ratios_by_group
from stages.evaluate.points import EvaluatedTiles
from stages.evaluate.scores import rate_text
from stages.evaluate.training_curves import read_curves, training_curves
from stages.figures import publish_figure
from vico.inference.routed_picture import COMPRESS_COLOUR, KEEP_COLOUR, routed_picture, tinted_colour
from vico.inference.routing import absolute_rule
from vico.prompt import load_prompt_format

TitledPicture = tuple[str, Image.Image]
Colour = tuple[float, float, float]
LegendKey = tuple[str, Colour, Colour]
"""(label, colour of the frame, colour of white paper in it) of a mark."""
_WHITE = (255, 255, 255)
SHEET_PICTURES, SHEET_COLUMNS = 12, 3
_TITLE_COLUMNS = 52


def publish_plots(
    context: Context,
    samples: pa.Table,
    tiles: EvaluatedTiles,
    predictions: pa.Table,
    metrics: Mapping[str, Any],
) -> None:
    """Publish `figures/*.png`."""
    publish_figure(context, "quality_against_tokens", quality_against_tokens(metrics))
    curves = read_curves(context, ("consistency", "router"))
    publish_figure(context, "training_curves", training_curves(curves))
    if tiles.ratio_N is not None and len(tiles.ratio_N):
        kinds = samples["kind"].to_pylist()
        kind_N = [kind for kind, count in zip(kinds, tiles.num_tiles_S, strict=True) for _ in range(count)]
        groups = [("Test tiles by what they show", tiles.contents), ("Test tiles by kind of record", kind_N)]
        publish_figure(context, "ratios_by_content", ratios_by_group(tiles.ratio_N, groups))
    pictures = routed_pictures(context, samples, tiles, predictions, metrics["absolute_threshold"])
    if pictures:
        tokens = metrics["tokens_a_tile"]
        legend = (
            (f"kept at the full rate, {tokens['full']} tokens", _fractions(KEEP_COLOUR), _fractions(_WHITE)),
            (
                f"compressed to {tokens['compressed']} tokens",
                _fractions(COMPRESS_COLOUR),
                _fractions(tinted_colour(_WHITE)),
            ),
        )
        publish_figure(context, "routed_pictures", picture_sheet(pictures, legend))


def routed_pictures(
    context: Context, samples: pa.Table, tiles: EvaluatedTiles, predictions: pa.Table, threshold: float
) -> list[TitledPicture]:
    """Return the first pictures of some test samples with their routed tiles, sorted by kind.

    A title has the kind, the question and both answers.
    """
    reader = SampleReader(context.folder("shard"), load_prompt_format(context.folder("model")))
    routed = tiles.by_sample(absolute_rule(torch.from_numpy(tiles.p_compress_N), threshold).numpy())
    settings = reader.prompt_format.settings
    shown = _shown_samples(samples, tiles)
    answers = _answers({samples["key"][s].as_py(): rate_text(routed[s]) for s in shown}, predictions)
    pictures = []
    for s in shown:
        row = samples["row"][s].as_py()
        indexed = reader.index.row(row)
        decisions = routed[s][: indexed["tiles"][0]].tolist()
        tiling = settings.tiling(indexed["max_tiles"])
        picture = routed_picture(reader.pictures(row)[0], tiling, settings, decisions)
        pictures.append((_title(indexed["kind"], answers[indexed["key"]]), picture))
    return pictures


def _shown_samples(samples: pa.Table, tiles: EvaluatedTiles) -> list[int]:
    """Return the numbers of the samples on the sheet, taken from the kinds in turn.

    Pictures of several tiles come first, since the routing of one tile shows little.
    """
    by_kind: dict[str, list[int]] = defaultdict(list)
    for s, (kind, shapes) in enumerate(zip(samples["kind"].to_pylist(), tiles.tiles_per_image, strict=True)):
        if shapes:
            by_kind[kind].append(s)
    ordered = [sorted(by_kind[kind], key=lambda s: tiles.num_tiles_S[s] == 1) for kind in sorted(by_kind)]
    in_turn = [s for turn in zip_longest(*ordered) for s in turn if s is not None]
    return sorted(in_turn[:SHEET_PICTURES], key=lambda s: samples["kind"][s].as_py())


def _answers(rates_by_key: Mapping[str, str], predictions: pa.Table) -> dict[str, dict[str, Any]]:
    """Return the row of the policy's answer to each key at the given rates."""
    columns = ("key", "model", "rates", "question", "answer", "prediction", "similarity")
    rows = zip(*(predictions[name].to_pylist() for name in columns), strict=True)
    answers = (dict(zip(columns, row, strict=True)) for row in rows)
    return {
        answer["key"]: answer
        for answer in answers
        if answer["model"] == "policy" and rates_by_key.get(answer["key"]) == answer["rates"]
    }


def _title(kind: str, answer: Mapping[str, Any]) -> str:
    def short(text: str, width: int) -> str:
        return textwrap.shorten(text, width, placeholder=" ...")

    prediction, expected = (short(answer[name], 30) for name in ("prediction", "answer"))
    verdict = "right" if answer["similarity"] == 1 else f"expected: {expected}"
    return f"{kind}: {short(answer['question'], _TITLE_COLUMNS - len(kind))}\n{prediction} ({verdict})"


def _fractions(colour: tuple[int, int, int]) -> Colour:
    red, green, blue = colour
    return red / 255, green / 255, blue / 255


def picture_sheet(pictures: Sequence[TitledPicture], legend: Sequence[LegendKey]) -> Figure:
    """Draw the pictures on a grid, each as wide as its cell allows."""
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
        Patch(facecolor=paper, edgecolor=frame, linewidth=2, label=label) for label, frame, paper in legend
    ]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), fontsize=11, frameon=False)
    return figure
