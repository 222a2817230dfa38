"""What evaluation looks at: the chosen test samples, their tiles with router scores, ratios and pixel
measures, the thresholds of the sweep.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.tasks import actor_pool
from data_prep.draws import chosen_rows
from data_prep.shards.index import load_index
from stages.context import Context
from stages.evaluate.actors import TileScorer
from stages.evaluate.config import BLOCK_SAMPLES, EvaluateConfig
from stages.evaluate.pixel_rule import tile_labels
from stages.evaluate.points import UNLABELLED, EvaluatedTiles
from stages.inference import inference_settings
from stages.outputs import RATIOS_FILE, ROUTER_FILE, SCORES_FILE
from vico.errors import UserError
from vico.inference.routing import calibrated_threshold

TilePlace = tuple[str, int, int]  # key, image, tile


def chosen_samples(config: EvaluateConfig, context: Context) -> pa.Table:
    """row, key, kind, group and tiles of the chosen test samples, in index order; those without an answer
    stay out.
    """
    folder = context.inputs["shard"]
    table = load_index(folder).table(["key", "kind", "group", "tiles", "answer_tokens"], "test")
    table = table.filter(pc.greater(table["answer_tokens"], 0))
    if not len(table):
        raise UserError(
            f"{folder}: no test sample has an answer; raise shard.test_share or give more records"
        )
    chosen = chosen_rows(table["row"].to_numpy(), config.max_samples, config.seed)
    return table.filter(pc.is_in(table["row"], pa.array(chosen)))


def sweep(config: EvaluateConfig, context: Context, calibrated: float) -> list[float]:
    """The thresholds to measure, falling: those that compress the config's shares of calib tiles, and the
    calibrated one."""
    scores = pq.read_table(context.inputs["router"] / SCORES_FILE, columns=["split", "p_compress"])
    calib = scores.filter(pc.equal(scores["split"], "calib"))["p_compress"].to_numpy()
    found = {calibrated_threshold(calib, share) for share in config.shares}
    return sorted(found | {calibrated}, reverse=True)


def tiles_of(
    config: EvaluateConfig, context: Context, samples: pa.Table, measured: pa.Table, feature: str | None
) -> EvaluatedTiles:
    """The samples' tiles with router scores, with their own ratios where the ratio stage saw all of them,
    and with the pixel measure `feature` of `measured`. Needs Ray where the router stage left tiles out.
    """
    places = tile_places(samples)
    ratios = known_ratios(context.inputs["ratio"] / RATIOS_FILE)
    ratio_N = None
    if all(place in ratios for place in places):
        ratio_N = np.array([ratios[place] for place in places], np.float64)
    scores = router_scores(config, context, samples)
    labels = tile_labels(context)
    detail = {} if feature is None else by_tile(measured, feature)
    return EvaluatedTiles(
        tiles_per_image=[tuple(tiles) for tiles in samples["tiles"].to_pylist()],
        p_compress_N=np.array([scores[place] for place in places], np.float32),
        ratio_N=ratio_N,
        detail_N=None if feature is None else np.array([detail[place] for place in places], np.float64),
        label_N=np.array([labels.get(place, UNLABELLED) for place in places], np.int8),
    )


def known_ratios(path: Path) -> dict[TilePlace, float]:
    """The ratios of the test tiles that the ratio stage saw; those of train, which are most, are not read."""
    columns = ["key", "image", "tile", "ratio"]
    return by_tile(pq.read_table(path, columns=columns, filters=[("split", "=", "test")]), "ratio")


def tile_places(samples: pa.Table) -> list[TilePlace]:
    """(key, image, tile) of every tile, sample after sample in prompt order."""
    return [
        (key, image, tile)
        for key, tiles in zip(samples["key"].to_pylist(), samples["tiles"].to_pylist(), strict=True)
        for image, count in enumerate(tiles)
        for tile in range(count)
    ]


def by_tile(table: pa.Table, column: str) -> dict[TilePlace, float]:
    """A column of a table with a row a tile, by key, image and tile."""
    rows = zip(*(table[name].to_pylist() for name in ("key", "image", "tile", column)), strict=True)
    return {(key, image, tile): value for key, image, tile, value in rows}


def tile_contents_of(samples: pa.Table, measured: pa.Table) -> list[str | None]:
    """What each tile of the samples shows where its record says so (the demo's do), in the tiles' order."""
    contents = by_tile(measured, "content")
    return [contents[place] for place in tile_places(samples)]


def ratio_by_content(tiles: EvaluatedTiles, contents: Sequence[str | None]) -> dict[str, dict]:
    """Number of tiles and median loss ratio by content, falling; empty where ratios or contents are unknown.

    `plain and photograph` is the median over both together: what small text is held against.
    """
    if tiles.ratio_N is None:
        return {}
    content_N = np.array([content or "" for content in contents])
    groups = {str(name): content_N == name for name in np.unique(content_N) if name}
    both = np.isin(content_N, ("plain", "photograph"))
    if both.any():
        groups["plain and photograph"] = both
    found = {
        name: {"tiles": int(mask_N.sum()), "median": float(np.median(tiles.ratio_N[mask_N]))}
        for name, mask_N in groups.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]["median"]))


def router_scores(config: EvaluateConfig, context: Context, samples: pa.Table) -> dict[TilePlace, float]:
    """P(compress) of the samples' tiles: from the router stage where it scored them, computed where not."""
    scores = by_tile(pq.read_table(context.inputs["router"] / SCORES_FILE), "p_compress")
    missing = {place[0] for place in tile_places(samples) if place not in scores}
    if missing:
        some = samples.filter(pc.is_in(samples["key"], pa.array(sorted(missing))))
        scores |= by_tile(_computed_scores(config, context, some), "p_compress")
    return scores


def _computed_scores(config: EvaluateConfig, context: Context, samples: pa.Table) -> pa.Table:
    """Router scores of the samples by actors, published as `scores.parquet`; columns as in the router's own
    table.
    """
    parts = context.parts
    if parts.done(SCORES_FILE):
        return pq.read_table(parts.output / SCORES_FILE)
    rows = samples["row"].to_pylist()
    items = [rows[first : first + BLOCK_SAMPLES] for first in range(0, len(rows), BLOCK_SAMPLES)]
    actor = (inference_settings(context, config.dtype), context.inputs["router"] / ROUTER_FILE)
    found: dict[int, list[np.ndarray]] = {}
    results = actor_pool(TileScorer, actor, items, "scores", site=context.site, check=context.check)
    for number, scores in results:
        found[number] = scores
        context.progress(len(found), len(items), "score blocks")
    key, image, tile = zip(*tile_places(samples), strict=True)
    values = np.concatenate([one for number in sorted(found) for one in found[number]])
    table = pa.table({"key": key, "image": image, "tile": tile, "p_compress": values})
    pq.write_table(table, parts.partial(SCORES_FILE))
    parts.publish(SCORES_FILE)
    return table
