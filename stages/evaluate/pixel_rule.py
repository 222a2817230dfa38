"""The control that learns nothing: tiles ranked by one measure of their pixels, chosen on calib."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from cluster.tasks import actor_pool
from data_prep.demo.mix import tile_contents
from data_prep.demo.records import drawn_record
from data_prep.draws import chosen_rows
from data_prep.records.config import RecordsConfig
from data_prep.shards.index import load_index
from stages.context import Context
from stages.evaluate.config import BLOCK_SAMPLES, EvaluateConfig
from stages.inference import InferenceSettings, inference_settings, opened_reader
from stages.outputs import SCORES_FILE, TILES_FILE
from vico.errors import UserError
from vico.tiling import IMAGENET_MEAN, IMAGENET_STD


def measured_tiles(config: EvaluateConfig, context: Context, samples: pa.Table) -> pa.Table:
    """`tiles.parquet`: pixel measures of the tiles of the chosen test samples, and of as many calib ones."""
    parts = context.parts
    if parts.done(TILES_FILE):
        return pq.read_table(parts.output / TILES_FILE)
    calib = load_index(context.inputs["shard"]).table(["num_tiles"], "calib")
    calib_rows = calib.filter(pc.greater(calib["num_tiles"], 0))["row"].to_numpy()
    rows = chosen_rows(calib_rows, config.max_samples, config.seed).tolist() + samples["row"].to_pylist()
    items = [rows[first : first + BLOCK_SAMPLES] for first in range(0, len(rows), BLOCK_SAMPLES)]
    actor = (inference_settings(context, config.dtype), demo_sources(context.inputs))
    found: dict[int, pa.Table] = {}
    for number, table in actor_pool(
        TileMeasurer, actor, items, "measures", site=context.site, check=context.check
    ):
        found[number] = table
        context.progress(len(found), len(items), "blocks of tiles measured")
    tiles = pa.concat_tables([found[number] for number in sorted(found)])
    pq.write_table(tiles, parts.partial(TILES_FILE))
    parts.publish(TILES_FILE)
    return tiles


def demo_sources(inputs: Mapping) -> dict:
    """Source name -> records config, for those inputs that are the built-in demo."""
    named = {"demo": inputs["records"], "heldout-demo": inputs["heldout"]}
    return {name: config for name, config in named.items() if config is not None and config.format == "demo"}


def feature_aucs(measured: pa.Table, labels: Mapping[tuple, int], split: str) -> dict[str, float | None]:
    """How well each measure ranks the labelled tiles of a split, keep above compress; null without both
    labels.
    """
    from sklearn.metrics import roc_auc_score

    tiles = measured.filter(pc.equal(measured["split"], split))
    places = list(zip(*(tiles[name].to_pylist() for name in ("key", "image", "tile")), strict=True))
    known = np.array([place in labels for place in places], bool)
    keep = np.array([labels[place] == 1 for place in places if place in labels], bool)
    if not keep.any() or keep.all():
        return dict.fromkeys(FEATURES)
    return {name: float(roc_auc_score(keep, tiles[name].to_numpy()[known])) for name in FEATURES}


def tile_labels(context: Context) -> dict[tuple, int]:
    """Label of each tile of calib and test that the router stage scored; 1 keep, 0 compress."""
    scores = pq.read_table(context.inputs["router"] / SCORES_FILE)
    scores = scores.filter(pc.is_in(scores["label"], pa.array([0, 1], scores["label"].type)))
    columns = (scores[name].to_pylist() for name in ("key", "image", "tile", "label"))
    return {(key, image, tile): label for key, image, tile, label in zip(*columns, strict=True)}


def pixel_rule_choice(measured: pa.Table, labels: Mapping[tuple, int]) -> dict:
    """The measure that ranks calib tiles best by their labels, and the AUC of all of them on calib and test.

    By the labels rather than by answers: this is what the router itself is trained to rank, and answers of
    calib samples at every measure and threshold would cost as much as the evaluation. `feature` is null where
    calib has no tiles of both labels: then there is no rule.
    """
    calib = feature_aucs(measured, labels, "calib")
    known = {name: auc for name, auc in calib.items() if auc is not None}
    return {
        "feature": max(known, key=known.__getitem__) if known else None,
        "auc_calib": calib,
        "auc_test": feature_aucs(measured, labels, "test"),
    }


JPEG_QUALITY = 75  # Pillow's default; the order of the tiles hardly depends on it
FEATURES = ("jpeg_bytes_a_pixel", "gradient_energy", "gray_deviation")
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("image", pa.int32()),
        ("tile", pa.int32()),
        ("content", pa.string()),
        *((name, pa.float64()) for name in FEATURES),
    ]
)


def pixel_features(pixels_N3SS: np.ndarray) -> dict[str, np.ndarray]:
    """FEATURES of normalised tiles (float32 [N, 3, S, S], as the vision tower sees them), float64 [N] each.

    Bytes of the tile as JPEG over its pixels; mean squared gray gradient, both directions; standard deviation
    of gray levels. More of each means more to see.
    """
    shape = (3, 1, 1)
    mean, std = (np.asarray(values, np.float32).reshape(shape) for values in (IMAGENET_MEAN, IMAGENET_STD))
    found: dict[str, list[float]] = {name: [] for name in FEATURES}
    for tile_3SS in pixels_N3SS:
        levels = np.clip(np.rint((tile_3SS * std + mean) * 255), 0, 255).astype(np.uint8)
        image = Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=JPEG_QUALITY)
        gray_SS = np.asarray(image.convert("L"), np.float64)
        gradients = (np.diff(gray_SS, axis=axis) ** 2 for axis in (0, 1))
        values = len(data.getvalue()) / gray_SS.size, sum(one.mean() for one in gradients), gray_SS.std()
        for name, value in zip(FEATURES, values, strict=True):
            found[name].append(float(value))
    return {name: np.array(values, np.float64) for name, values in found.items()}


class TileMeasurer:
    """Reads samples and measures their tiles; `demo` maps source names of demo records to their config."""

    def __init__(self, settings: InferenceSettings, demo: Mapping[str, RecordsConfig]):
        self.reader, self.demo = opened_reader(settings), demo

    def measures(self, rows: Sequence[int]) -> pa.Table:
        """A row a tile in the order of SCHEMA; `content` is null where the record is not the demo's."""
        tables = [SCHEMA.empty_table()]
        for row in rows:
            entry, sample = self.reader.index.row(row), self.reader.sample(row)
            places = [(image, tile) for image, count in enumerate(entry["tiles"]) for tile in range(count)]
            columns = {
                "key": [entry["key"]] * len(places),
                "split": [entry["split"]] * len(places),
                "image": [image for image, _ in places],
                "tile": [tile for _, tile in places],
                "content": self._contents(entry, len(places)),
                **pixel_features(sample.pixels),
            }
            tables.append(pa.table(columns, SCHEMA))
        return pa.concat_tables(tables)

    def _contents(self, entry: Mapping, num_tiles: int) -> list[str | None]:
        """What each tile shows, told by drawing the demo record again: (seed, line) alone decide it."""
        config = self.demo.get(entry["source"])
        if config is None or not num_tiles:
            return [None] * num_tiles
        content = drawn_record(config.seed, entry["line"]).content
        tiling = self.reader.prompt_format.settings.tiling(entry["max_tiles"])
        contents = [] if content is None else tile_contents(content.canvas, tiling)
        if len(contents) != num_tiles:
            raise UserError(
                f"{entry['key']} has {num_tiles} tiles, this version draws {len(contents)}; the shards were "
                "written by another version of the demo: run again with --force shard"
            )
        return contents
