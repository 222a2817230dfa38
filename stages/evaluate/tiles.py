"""The test samples of an evaluation, and their tiles with router scores, loss ratios and pixel measures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.tasks import actor_pool
from data_prep.draws import chosen_rows, limited
from data_prep.shards.index import load_index
from stages.context import Context
from stages.controls import BLIND_ORACLE, FEWER_TILES
from stages.evaluate.actors import TileScorer
from stages.evaluate.config import BLOCK_SAMPLES, EvaluateConfig
from stages.evaluate.points import UNLABELLED, EvaluatedTiles
from stages.evaluate.tile_measures.pixel_rule import TILE_KEY_COLUMNS, TileKey, tile_keys, tile_labels
from stages.evaluate.tile_measures.question_ratios import blind_ratios
from stages.inference import inference_settings
from stages.losses_policy import check_policy
from stages.outputs import (
    BLANK_SPLIT,
    CALIB_SCORES_FILE,
    LABELS_FILE,
    POLICY_FOLDER,
    ROUTER_FILE,
    SCORES_FILE,
)
from stages.ratio_scale import ratio_scale
from vico.errors import UserError
from vico.inference.calibration import placed_threshold
from vico.settings import ModelSettings, load_settings
from vico.tiling import num_tiles

_SAMPLE_COLUMNS = (
    *("key", "kind", "group", "image_sha256", "tiles", "answer_tokens", "widths", "heights", "max_tiles"),
)


def chosen_samples(config: EvaluateConfig, context: Context, split: str = "test") -> pa.Table:
    """Return the index rows of the chosen samples of a split with an answer, in index order: row, key, kind,
    group, tiles, sizes of pictures."""
    folder = context.folder("shard")
    table = load_index(folder).table(_SAMPLE_COLUMNS, split)
    table = table.filter(pc.greater(table["answer_tokens"], 0))
    if not len(table):
        raise UserError(
            f"{folder}: no {split} sample has an answer; raise shard.{split}_share or give more records"
        )
    chosen = chosen_rows(table["row"].to_numpy(), config.max_samples, config.seed)
    if len(chosen) < len(table):
        context.note(limited(len(chosen), len(table), split))
    return table.filter(pc.is_in(table["row"], pa.array(chosen)))


def swept_thresholds(config: EvaluateConfig, context: Context, calibrated: float) -> list[float]:
    """Return the thresholds to measure, falling: one per share of the config, and the calibrated one."""
    scores = pq.read_table(context.folder("router") / SCORES_FILE, columns=["split", "p_compress"])
    calib, blank = (
        scores.filter(pc.equal(scores["split"], split))["p_compress"].to_numpy()
        for split in ("calib", BLANK_SPLIT)
    )
    thresholds = {placed_threshold(calib, share, blank_probability_B=blank).value for share in config.shares}
    return sorted(thresholds | {calibrated}, reverse=True)


def evaluated_tiles(
    config: EvaluateConfig,
    context: Context,
    samples: pa.Table,
    measured: pa.Table,
    pixel_scores: np.ndarray | None,
) -> EvaluatedTiles:
    """Return the samples' tiles with all that the controls need; `pixel_scores` are the pixel
    rule's log-odds of keep, one per row of `measured`, None without a rule.

    Needs Ray if the router stage did not score all of them.
    """
    keys = sample_tile_keys(samples)
    label_path = context.folder("label") / LABELS_FILE
    check_policy(label_path, context.folder("consistency") / POLICY_FOLDER, "label")
    ratios = ratios_of_test_tiles(label_path)
    ratio_N = None
    if all(key in ratios for key in keys):
        ratio_N = np.array([ratios[key] for key in keys], np.float64)
    scores = router_scores(config, context, samples, "test")
    labels = tile_labels(context)
    pixel_N = None
    if pixel_scores is not None:
        by_tile = dict(zip(tile_keys(measured), pixel_scores.tolist(), strict=True))
        pixel_N = np.array([by_tile[key] for key in keys], np.float64)
    contents = column_by_tile(measured, "content")
    blind_N = None
    if BLIND_ORACLE.name in config.controls and ratio_N is not None:
        blind = blind_ratios(config, context, samples, ratios, ratio_scale(label_path))
        blind_N = np.array([blind.get(key, np.nan) for key in keys], np.float64) if blind else None
    return EvaluatedTiles(
        tiles_per_image=[tuple(tiles) for tiles in samples["tiles"].to_pylist()],
        p_compress_N=np.array([scores[key] for key in keys], np.float32),
        ratio_N=ratio_N,
        pixel_score_N=pixel_N,
        label_N=np.array([labels.get(key, UNLABELLED) for key in keys], np.int8),
        contents=[contents[key] for key in keys],
        blind_ratio_N=blind_N,
        retiled_S=retiled(config, samples, load_settings(context.folder("model"))),
    )


def retiled(config: EvaluateConfig, samples: pa.Table, settings: ModelSettings) -> dict[int, np.ndarray]:
    """Return each sample's number of tiles, int64 [S], by the most tiles per picture of the control
    `fewer_tiles`. Limits under which every sample keeps its tiles are left out."""
    if FEWER_TILES.name not in config.controls:
        return {}
    columns = (samples[name].to_pylist() for name in ("widths", "heights", "max_tiles", "tiles"))
    rows = list(zip(*columns, strict=True))
    counts_of: dict[int, np.ndarray] = {}
    for limit in sorted(set(config.fewer_tiles)):
        counts_S = [
            sum(
                num_tiles(width, height, settings.tiling(min(limit, max_tiles)))
                for width, height in zip(widths, heights, strict=True)
            )
            for widths, heights, max_tiles, _ in rows
        ]
        if counts_S != [sum(tiles) for _, _, _, tiles in rows]:
            counts_of[limit] = np.array(counts_S, np.int64)
    return counts_of


def ratios_of_test_tiles(path: Path) -> dict[TileKey, float]:
    """Return the loss ratios of test tiles, with the floor of the labels; those of train, which are most of
    the table, are not read."""
    columns = [*TILE_KEY_COLUMNS, "ratio"]
    return column_by_tile(pq.read_table(path, columns=columns, filters=[("split", "=", "test")]), "ratio")


def sample_tile_keys(samples: pa.Table) -> list[TileKey]:
    """Return the keys of all tiles, sample after sample in prompt order."""
    return [
        (key, image, tile)
        for key, tiles in zip(samples["key"].to_pylist(), samples["tiles"].to_pylist(), strict=True)
        for image, count in enumerate(tiles)
        for tile in range(count)
    ]


def column_by_tile(table: pa.Table, column: str) -> dict[TileKey, Any]:
    """Return a column of a table with one row per tile."""
    return dict(zip(tile_keys(table), table[column].to_pylist(), strict=True))


class ContentRatio(TypedDict):
    """Tiles that show the same kind of content, and their median loss ratio."""

    tiles: int
    median: float


def ratio_by_content(tiles: EvaluatedTiles) -> dict[str, ContentRatio]:
    """Return the median loss ratio of tiles by what they show, falling; empty if either is unknown.

    `plain and photograph` is the median over both together, to compare small text with.
    """
    if tiles.ratio_N is None:
        return {}
    content_N = np.array([content or "" for content in tiles.contents])
    masks = {str(name): content_N == name for name in np.unique(content_N) if name}
    both = np.isin(content_N, ("plain", "photograph"))
    if both.any():
        masks["plain and photograph"] = both
    ratios: dict[str, ContentRatio] = {
        name: {"tiles": int(mask_N.sum()), "median": float(np.median(tiles.ratio_N[mask_N]))}
        for name, mask_N in masks.items()
    }
    return dict(sorted(ratios.items(), key=lambda item: -item[1]["median"]))


def router_scores(
    config: EvaluateConfig, context: Context, samples: pa.Table, split: str
) -> dict[TileKey, float]:
    """Return P(compress) of the tiles of samples of a split, computed for those that the router stage did not
    score."""
    scores = scored_tiles(context)
    unscored = {key for key, image, tile in sample_tile_keys(samples) if (key, image, tile) not in scores}
    if unscored:
        chosen = samples.filter(pc.is_in(samples["key"], pa.array(sorted(unscored))))
        computed = _computed_scores(
            config, context, chosen, CALIB_SCORES_FILE if split == "calib" else SCORES_FILE
        )
        scores |= column_by_tile(computed, "p_compress")
    return scores


def scored_tiles(context: Context) -> dict[TileKey, float]:
    """Return P(compress) of the tiles that the router stage scored."""
    return column_by_tile(pq.read_table(context.folder("router") / SCORES_FILE), "p_compress")


def _computed_scores(config: EvaluateConfig, context: Context, samples: pa.Table, name: str) -> pa.Table:
    """Score the samples' tiles with actors and publish the table under this name."""
    parts = context.parts
    if parts.done(name):
        return pq.read_table(parts.output / name)
    rows = samples["row"].to_pylist()
    blocks = [rows[first : first + BLOCK_SAMPLES] for first in range(0, len(rows), BLOCK_SAMPLES)]
    arguments = (inference_settings(context, config.dtype), context.folder("router") / ROUTER_FILE)
    scores: dict[int, Sequence[np.ndarray]] = {}
    results = actor_pool(TileScorer, arguments, blocks, "scores", site=context.site, check=context.check)
    for number, block_scores in results:
        scores[number] = block_scores
        context.progress(len(scores), len(blocks), "score blocks")
    key, image, tile = zip(*sample_tile_keys(samples), strict=True)
    values = np.concatenate([sample for number in sorted(scores) for sample in scores[number]])
    table = pa.table({"key": key, "image": image, "tile": tile, "p_compress": values})
    pq.write_table(table, parts.partial(name))
    parts.publish(name)
    return table
