"""Losses of another policy are refused by the stages that would use them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.train_settings import TrainSettings
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.tiles import evaluated_tiles
from stages.losses_policy import policy_digest, with_policy
from stages.outputs import LABELS_FILE, POLICY_FOLDER, RATIOS_FILE
from stages.parts import Parts
from stages.router.config import RouterConfig
from stages.router.packs import RouterSettings, prepared
from tests.stage_context import stage_context
from vico.errors import UserError

TABLE = pa.table({"key": ["a"], "split": ["train"], "image": [0], "tile": [0], "label": [1]})


@pytest.fixture
def other_policy(tmp_path):
    """Return the consistency output of a run whose labels and ratios, in `made/`, are of another policy."""
    for name, content in (("made", b"1"), ("run", b"2")):
        folder = tmp_path / name / POLICY_FOLDER
        folder.mkdir(parents=True)
        (folder / "model-00001-of-00002.safetensors").write_bytes(b"0")
        (folder / "model-00002-of-00002.safetensors").write_bytes(content)
    marked = with_policy(TABLE, tmp_path / "made" / POLICY_FOLDER)
    for name in (LABELS_FILE, RATIOS_FILE):
        pq.write_table(marked, tmp_path / "made" / name)
    return tmp_path / "run"


def test_the_digest_is_that_of_all_weights_and_nothing_else(other_policy):
    policy = other_policy / POLICY_FOLDER
    before = policy_digest(policy)
    (policy / "README.md").write_text("a card")
    assert policy_digest(policy) == before
    (policy / "model-00001-of-00002.safetensors").write_bytes(b"3")
    assert policy_digest(policy) != before


def test_the_router_refuses_labels_of_another_policy(other_policy, tmp_path):
    settings = RouterSettings(
        config=RouterConfig(seed=0),
        shard_folder=tmp_path,
        policy_folder=other_policy / POLICY_FOLDER,
        label_folder=tmp_path / "made",
        parts=Parts(tmp_path / "router", 1),
        train=TrainSettings(),
    )
    with pytest.raises(UserError, match=r"of another policy than .*inputs.adopt.label"):
        prepared(settings)


def test_the_evaluation_refuses_labels_of_another_policy(other_policy, tmp_path):
    inputs = {"label": tmp_path / "made", "consistency": other_policy}
    samples = pa.table({"key": ["a"], "tiles": [[1]]})
    context = stage_context("evaluate", tmp_path, inputs)
    with pytest.raises(UserError, match=r"of another policy than .*inputs.adopt.label"):
        evaluated_tiles(EvaluateConfig(seed=0), context, samples, samples, None)
