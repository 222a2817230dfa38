"""What evaluation looks at: the chosen test samples, their tiles with router scores and ratios, the
thresholds of the sweep.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.ray_session import ray_session
from cluster.tasks import actor_pool
from data_prep.index import load_index
from stages.context import Context
from stages.evaluate import BLOCK_SAMPLES, SCORES_FILE, EvaluateConfig
from stages.evaluate_worker import TileScorer
from stages.inference import ROUTER_FILE, inference_settings
from stages.operating_points import EvaluatedTiles
from stages.ratio import RATIOS_FILE
from stages.sample_choice import chosen_rows
from vico.calibration import calibrated_threshold
from vico.errors import UserError

TilePlace = tuple[str, int, int]  # key, image, tile


def chosen_samples(config: EvaluateConfig, context: Context) -> pa.Table:
    """row, key, kind and tiles of the chosen test samples, in index order; those without an answer stay
    out.
    """
    folder = context.inputs["shard"]
    table = load_index(folder).table(["key", "kind", "tiles", "answer_tokens"], "test")
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


def tiles_of(config: EvaluateConfig, context: Context, samples: pa.Table) -> EvaluatedTiles:
    """The samples' tiles with router scores, and with their own ratios where the ratio stage saw all of
    them.
    """
    places = tile_places(samples)
    ratios = by_tile(pq.read_table(context.inputs["ratio"] / RATIOS_FILE), "ratio")
    ratio_N = None
    if all(place in ratios for place in places):
        ratio_N = np.array([ratios[place] for place in places], np.float64)
    scores = router_scores(config, context, samples)
    return EvaluatedTiles(
        tiles_per_image=[tuple(tiles) for tiles in samples["tiles"].to_pylist()],
        p_compress_N=np.array([scores[place] for place in places], np.float32),
        ratio_N=ratio_N,
    )


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
    with ray_session(context.site):
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
