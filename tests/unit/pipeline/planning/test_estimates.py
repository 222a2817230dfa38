"""Estimates of a stage that never ran; estimates from records are tested in tests/integration."""

import math

import pytest

from cluster.site import Site
from pipeline.config.graph import pipeline_graph
from pipeline.planning.estimates import stage_estimates
from pipeline.planning.request import RunRequest, open_pipeline
from tests.tiny_model import make_tiny_model
from vico.checkpoints.tensor_files import stored_tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def estimates(model, folder, *overrides):
    (folder / "pipeline.yaml").write_text(
        f"inputs: {{records: {{format: demo, num_samples: 20}}, model: {model}}}\n"
    )
    site = Site(name="test", storage=folder / "store", train={"checkpoints": {"keep": 2}})
    request = RunRequest(config=folder / "pipeline.yaml", site=site, overrides=overrides)
    return stage_estimates(open_pipeline(request, pipeline_graph()), site)


@pytest.mark.parametrize(
    "dtype, checkpoint, weights", [("float32", 4 + 12, 4), ("bfloat16", 2 + 12, 2)]
)  # bytes per parameter
def test_a_first_training_needs_what_the_stage_itself_will_check(model, tmp_path, dtype, checkpoint, weights):
    (stage, estimate), *others = estimates(
        model, tmp_path, f"consistency.optimizer.dtype={dtype}", "consistency.select=last"
    ).items()
    num_parameters = sum(math.prod(tensor.shape) for tensor in stored_tensors(model).values())
    assert stage == "consistency" and others == []
    assert estimate.storage_bytes == pytest.approx(
        1.1 * num_parameters * (3 * checkpoint + weights), rel=1e-5
    )
    assert estimate.memory_bytes == pytest.approx(1.1 * num_parameters * (checkpoint + weights), rel=1e-5)
    assert estimate.seconds is None and "train.checkpoints.keep=2" in estimate.source


def test_a_damaged_model_gives_no_estimate_and_no_error(model, tmp_path):
    damaged = tmp_path / "model"
    damaged.mkdir()
    for path in model.iterdir():
        data = path.read_bytes()
        (damaged / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    assert estimates(damaged, tmp_path) == {}
