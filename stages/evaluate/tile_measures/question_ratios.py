"""Loss ratios of tiles over questions other than the scored one, for the blind oracle.

A router does not see the question. The best that it can know about a tile is what the tile is worth to other
questions about the same picture: earlier questions of the record, and other test records of the picture.

Shapes: T tiles of a sample.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.tasks import actor_pool
from stages.context import Context
from stages.evaluate.config import BLOCK_SAMPLES, EvaluateConfig
from stages.evaluate.tile_measures.pixel_rule import TileKey
from stages.finite import check_finite
from stages.inference import InferenceSettings, inference_settings, load_models, open_reader
from stages.outputs import QUESTION_RATIOS_FILE
from stages.ratio_scale import RatioScale
from vico.inference.branches import RatedSample
from vico.inference.tile_losses import encoded_tiles, rate_losses
from vico.objectives.labels import loss_ratio
from vico.prompt import is_learned
from vico.special_tokens import IMAGE_MARK

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.int32()),
        ("tile", pa.int32()),
        ("log_ratio", pa.float64()),
        ("scored", pa.string()),
        ("asked", pa.list_(pa.string())),
    ]
)
CutPictures = tuple[tuple[bytes, ...], tuple[int, ...], int]
"""Digests of a sample's pictures, tiles per picture, and the sample's limit of tiles per picture."""


class QuestionLosses:
    """A policy and its reference; `ratios` measures tiles by the earlier questions of their records."""

    def __init__(self, settings: InferenceSettings, scale: RatioScale):
        self.settings, self.scale = settings, scale
        self.reader = open_reader(settings)
        self.policy, self.reference = load_models(settings, self.reader)

    def ratios(self, rows: Sequence[int]) -> pa.Table:
        """Return one row per tile (SCHEMA).

        `log_ratio` is the log of the loss ratio over the answers before the last one. It is null if there are
        none, if they answer the last question, too, if the tile's picture comes later, and unless the scale's
        isolation is `tile`, as it is measured here. `scored` is the last question, `asked` are all.
        """
        return pa.concat_tables([SCHEMA.empty_table(), *(self._sample_ratios(row) for row in rows)])

    def _sample_ratios(self, row: int) -> pa.Table:
        sample = self.reader.sample(row)
        turns = self.reader.record(row)["conversations"]
        history, num_images = history_before_last(turns)
        log_ratio_T: list[float | None] = [None] * len(sample.pixels)
        num_tiles = sum(sample.tiles_per_image[:num_images])
        scored = _text(turns[len(history)])
        is_other = scored not in [_text(turn) for turn in history if turn["from"] == "human"]
        if num_tiles and is_other and any(map(is_learned, history)) and self.scale.isolation == "tile":
            skeleton = self.reader.prompt_format.encode(history, sample.tiles_per_image[:num_images])
            policy, reference = (
                encoded_tiles(model, sample.pixels[:num_tiles], self.settings.batch_tiles)
                for model in (self.policy, self.reference)
            )
            rates = [np.zeros(num_tiles, bool), *np.eye(num_tiles, dtype=bool)]
            (losses,) = rate_losses(
                policy,
                reference,
                [RatedSample(skeleton, 0, rates)],
                row_tokens=self.settings.row_tokens,
                kl_chunk_rows=self.settings.kl_chunk_rows,
            )
            check_finite(sample.key, losses, "losses", self.settings.dtype, "evaluate.dtype")
            log_ratio_T[:num_tiles] = np.log(loss_ratio(losses[1:], losses[0], self.scale.floor)).tolist()
        asked = [_text(turn) for turn in turns if turn["from"] == "human"]
        tiles = [(image, tile) for image, count in enumerate(sample.tiles_per_image) for tile in range(count)]
        columns = {
            "key": [sample.key] * len(tiles),
            "image": [image for image, _ in tiles],
            "tile": [tile for _, tile in tiles],
            "log_ratio": log_ratio_T,
            "scored": [scored] * len(tiles),
            "asked": [asked] * len(tiles),
        }
        return pa.table(columns, SCHEMA)


def _text(turn: Mapping[str, Any]) -> str:
    return turn["value"].replace(IMAGE_MARK, "").strip()


def history_before_last(turns: Sequence[Mapping[str, Any]]) -> tuple[list[Any], int]:
    """Return the turns before the last question that has a learned answer, and their number of pictures."""
    last = max((n for n, turn in enumerate(turns) if is_learned(turn)), default=0)
    question = max((n for n in range(last) if turns[n]["from"] == "human"), default=0)
    history = list(turns[:question])
    return history, sum(turn["value"].count(IMAGE_MARK) for turn in history if turn["from"] != "gpt")


def blind_ratios(
    config: EvaluateConfig,
    context: Context,
    samples: pa.Table,
    ratios: Mapping[TileKey, float],
    scale: RatioScale,
) -> dict[TileKey, float]:
    """Return the geometric mean of a tile's loss ratios over other questions; tiles without any are left out.

    `ratios` are the ratios of the labels, on this scale, for other records whose pictures are cut into the
    same tiles. Publishes the measured ones.
    """
    table = _measured(config, context, samples, scale)
    pictures = _cut_pictures(samples)
    asked = {key: set(questions) for key, questions in _by_sample(table, "asked").items()}
    keys_of_pictures: dict[CutPictures, list[str]] = {}
    for key, cut in pictures.items():
        keys_of_pictures.setdefault(cut, []).append(key)
    scored = _by_sample(table, "scored")
    blind: dict[TileKey, float] = {}
    columns = (table[name].to_pylist() for name in ("key", "image", "tile", "log_ratio"))
    for key, image, tile, own in zip(*columns, strict=True):
        logs = [] if own is None else [own]
        for other in keys_of_pictures[pictures[key]]:
            ratio = ratios.get((other, image, tile))
            if other != key and ratio is not None and scored[key] not in asked[other]:
                logs.append(float(np.log(ratio)))
        if logs:
            blind[key, image, tile] = float(np.exp(np.mean(logs)))
    return blind


def _by_sample(table: pa.Table, column: str) -> dict[str, Any]:
    return dict(zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True))


def _cut_pictures(samples: pa.Table) -> dict[str, CutPictures]:
    """Return by sample its pictures and how they are cut: tile 4 of two cuts may be different regions."""
    columns = (samples[name].to_pylist() for name in ("key", "image_sha256", "tiles", "max_tiles"))
    return {
        key: (tuple(digests), tuple(tiles), max_tiles)
        for key, digests, tiles, max_tiles in zip(*columns, strict=True)
    }


def _measured(config: EvaluateConfig, context: Context, samples: pa.Table, scale: RatioScale) -> pa.Table:
    """Return the table of all samples, measured by actors unless it is published."""
    parts = context.parts
    if parts.done(QUESTION_RATIOS_FILE):
        return pq.read_table(parts.output / QUESTION_RATIOS_FILE)
    rows = samples["row"].to_pylist()
    blocks = [rows[first : first + BLOCK_SAMPLES] for first in range(0, len(rows), BLOCK_SAMPLES)]
    tables: dict[int, pa.Table] = {}
    arguments = (inference_settings(context, config.dtype), scale)
    results = actor_pool(QuestionLosses, arguments, blocks, "ratios", site=context.site, check=context.check)
    for number, table in results:
        tables[number] = table
        context.progress(len(tables), len(blocks), "blocks with ratios of other questions")
    measured = pa.concat_tables([tables[number] for number in sorted(tables)])
    pq.write_table(measured, parts.partial(QUESTION_RATIOS_FILE))
    parts.publish(QUESTION_RATIOS_FILE)
    return measured
