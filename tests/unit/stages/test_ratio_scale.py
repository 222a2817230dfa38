"""The scale of loss ratios, from the ratio stage through the label stage to the evaluation."""

import pyarrow as pa
import pyarrow.parquet as pq

from stages.label import stage as label
from stages.outputs import LABELS_FILE, RATIOS_FILE
from stages.ratio_scale import RatioScale, ratio_scale, with_isolation
from tests.stage_context import stage_context

NUM_TRAIN = 10
RATIOS = pa.table(
    {
        "key": [str(n) for n in range(NUM_TRAIN + 1)],
        "split": ["train"] * NUM_TRAIN + ["test"],
        "image": [0] * (NUM_TRAIN + 1),
        "tile": [0] * (NUM_TRAIN + 1),
        "loss_full": [0.1] * (NUM_TRAIN + 1),
        "loss_compressed": [0.1, 0.9] * (NUM_TRAIN // 2) + [0.5],
        "kind": ["x"] * (NUM_TRAIN + 1),
    }
)


def test_labels_say_how_their_ratios_were_made(tmp_path):
    (tmp_path / "ratio").mkdir()
    pq.write_table(with_isolation(RATIOS, "image"), tmp_path / "ratio" / RATIOS_FILE)
    context = stage_context("label", tmp_path, {"ratio": tmp_path / "ratio"})
    label.run(label.LabelConfig(seed=0, floor=0.5), context)
    path = context.parts.output / LABELS_FILE
    assert ratio_scale(path) == RatioScale("image", 0.5)
    assert pq.read_table(path)["ratio"].to_pylist() == [1.0, 1.4 / 0.6] * (NUM_TRAIN // 2) + [1.0 / 0.6]


def test_a_table_of_an_earlier_version_has_the_default_scale(tmp_path):
    pq.write_table(RATIOS, tmp_path / LABELS_FILE)
    assert ratio_scale(tmp_path / LABELS_FILE) == RatioScale("tile", 0.01)
