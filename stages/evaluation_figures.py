"""Which figures the evaluate stage publishes, and the sheet of routed test pictures among them."""

from collections import defaultdict
from itertools import zip_longest
from typing import Any

import pyarrow as pa
import torch

from data_prep.reader import SampleReader
from stages.context import Context
from stages.figures import (
    SHEET_PICTURES,
    picture_sheet,
    publish_figure,
    quality_against_tokens,
    read_curves,
    training_curves,
)
from stages.operating_points import EvaluatedTiles
from vico.prompt import load_prompt_format
from vico.routed_picture import routed_picture
from vico.routing import absolute_rule


def draw_evaluation(context: Context, samples: pa.Table, tiles: EvaluatedTiles, metrics: dict) -> None:
    """Publishes `figures/*.png`."""
    publish_figure(context, "quality_against_tokens", quality_against_tokens(metrics))
    publish_figure(
        context, "training_curves", training_curves(read_curves(context, ("consistency", "router")))
    )
    pictures = routed_pictures(context, samples, tiles, metrics["absolute_threshold"])
    if pictures:
        publish_figure(context, "routed_pictures", picture_sheet(pictures))


def routed_pictures(
    context: Context, samples: pa.Table, tiles: EvaluatedTiles, threshold: float
) -> list[tuple[str, Any]]:
    """(kind and key, first picture with its routed tiles) of some test samples, the kinds by turns."""
    reader = SampleReader(context.inputs["shard"], load_prompt_format(context.inputs["model"]))
    routed = tiles.by_sample(absolute_rule(torch.from_numpy(tiles.p_compress_N), threshold).numpy())
    by_kind: dict[str, list[int]] = defaultdict(list)
    for s, (kind, shapes) in enumerate(zip(samples["kind"].to_pylist(), tiles.tiles_per_image, strict=True)):
        if shapes:
            by_kind[kind].append(s)
    # Pictures of several tiles first: a routing of one tile shows little.
    ordered = [sorted(by_kind[kind], key=lambda s: len(routed[s]) == 1) for kind in sorted(by_kind)]
    turns = [s for turn in zip_longest(*ordered) for s in turn if s is not None]
    settings = reader.prompt_format.settings
    found = []
    for s in turns[:SHEET_PICTURES]:
        entry = reader.index.row(samples["row"][s].as_py())
        image = reader.pictures(samples["row"][s].as_py())[0]
        decisions = routed[s][: entry["tiles"][0]].tolist()
        drawn = routed_picture(image, settings.tiling(entry["max_tiles"]), settings, decisions)
        found.append((f"{entry['kind']}: {entry['key']}", drawn))
    return found
