"""Estimates of a stage that never ran; estimates from records are tested in tests/integration."""

import math

import pytest

from cluster.site import Site
from data_prep.shards.index import load_index
from pipeline.config.graph import pipeline_graph
from pipeline.planning.estimates import stage_estimates
from pipeline.planning.remedies import Limits
from pipeline.planning.request import RunRequest, open_pipeline
from pipeline.planning.shard_contents import TrainSize, train_size
from pipeline.planning.training_estimate import training_estimate
from pipeline.planning.training_shape import pack_tokens
from stages.consistency.config import ConsistencyConfig
from tests.finished_runs import finished_stage
from tests.record_tars import write_shard_folder
from tests.tiny_model import make_tiny_model
from vico.checkpoints.tensor_files import stored_tensors
from vico.memory.model_sizes import model_sizes
from vico.model_files import model_config
from vico.prompt import load_prompt_format

LIMITS = Limits(most_ranks=8, sample_tokens=8192)


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


@pytest.mark.parametrize("dtype, weights", [("float32", 4), ("bfloat16", 2)])  # bytes per parameter
def test_a_first_training_is_computed_from_config_and_site(model, tmp_path, dtype, weights):
    (stage, estimate), *others = estimates(
        model, tmp_path, f"consistency.optimizer.dtype={dtype}", "consistency.select=last"
    ).items()
    assert stage == "consistency" and others == []
    assert (estimate.seconds, estimate.storage_bytes) == (None, None)
    training = estimate.training
    num_start = sum(math.prod(tensor.shape) for tensor in stored_tensors(model).values())
    num_policy = model_sizes(model_config(model)).policy  # with the compressed connector
    assert num_policy > num_start
    assert training.checkpoint == (weights + 12) * num_policy
    assert (training.num_checkpoints, training.model) == (3, weights * num_policy)
    assert training.memory.weights == weights * num_policy
    assert training.memory.optimizer == 12 * num_policy // 2  # ZeRO spreads it over both ranks
    assert training.memory.host == weights * (num_policy + num_start)
    text = "\n".join(estimate.lines())
    assert "of host memory per rank at a full pack (activations" in text
    assert "disk: 3 checkpoints of" in text and "at most" not in text


def test_the_site_moves_memory_to_where_it_says(model, tmp_path):
    def memory(**settings):
        site = Site(name="test", storage=tmp_path, train={"memory": settings})
        sizes = model_sizes(model_config(model))
        return training_estimate(ConsistencyConfig(seed=0), sizes, site, 3, LIMITS).memory

    plain = memory()
    assert memory(zero_stage=3).weights == plain.weights // 2
    part = plain.optimizer // 3  # 4 of 12 bytes of each trained parameter of a rank
    assert plain.gradients == 2 * part  # in float32, those of a pack beside the sum of the packs before
    assert memory(zero_stage=1).gradients == 2 * part  # whole ones
    assert memory(zero_stage=3).gradients == part
    offloaded = memory(offload="optimizer")
    assert offloaded.optimizer == 0 and offloaded.gradients == plain.gradients
    assert offloaded.host == plain.host + plain.optimizer + 2 * part  # gradients, and the new weights
    assert memory(zero_stage=3, offload="optimizer").gradients == 0
    assert memory(reference="cpu").reference == 0
    assert memory(zero_stage=3, reference="sharded").host == plain.weights // 2  # read part by part
    assert memory(zero_stage=3).host == plain.reference + plain.weights // 2
    full, selective = (memory(activation_checkpointing=setting) for setting in ("full", "selective"))
    assert full.vision_activations < selective.vision_activations < plain.vision_activations
    assert full.language_activations < selective.language_activations < plain.language_activations


def test_a_frozen_tower_keeps_nothing_and_is_not_trained(model, tmp_path):
    site, sizes = Site(name="test", storage=tmp_path), model_sizes(model_config(model))
    whole, frozen = (
        training_estimate(ConsistencyConfig(seed=0, train_vision=train), sizes, site, 3, LIMITS)
        for train in (True, False)
    )
    assert frozen.memory.vision_activations == 0
    assert frozen.checkpoint == whole.checkpoint - 12 * sizes.vision


def test_a_stage_is_estimated_by_results_of_the_same_model_alone(model, tmp_path):
    """The demo's minutes say nothing about another model in the same storage."""
    (tmp_path / "pipeline.yaml").write_text(
        f"inputs: {{records: {{format: demo, num_samples: 20}}, model: {model}}}\n"
    )
    store = tmp_path / "store"
    request = RunRequest(tmp_path / "pipeline.yaml", Site(name="test", storage=store))
    own = open_pipeline(request, pipeline_graph()).pipeline.sources["model"]
    for run, fingerprint, seconds in (("own", own, 60.0), ("other", "0" * 64, 7.0)):
        times = {"seconds": seconds, "ended": f"2026-01-0{2 if run == 'other' else 1}T00:00:00+00:00"}
        policy = finished_stage(
            store, run, "consistency", {"p": "x"}, {}, made_from={"model": fingerprint}, **times
        )
        finished_stage(store, run, "router", {"r": "x"}, {}, made_from={"consistency": policy}, **times)
    finished_stage(store, "gone", "router", {"r": "x"}, {}, made_from={"consistency": "1" * 64}, seconds=9.0)
    estimates = stage_estimates(open_pipeline(request, pipeline_graph()), request.site)
    shown = {name: (estimate.seconds, estimate.source) for name, estimate in estimates.items()}
    assert shown == dict.fromkeys(("consistency", "router"), (60.0, "as in run own"))


def test_the_time_of_a_training_is_known_with_its_shards_and_speed(model, tmp_path):
    sizes = model_sizes(model_config(model))
    config = ConsistencyConfig(
        seed=0, epochs=1.5, packs_per_step=6, tiles_per_pack=10, reference_tokens_per_pack=1000
    )
    resources = {"workers": 4, "gpus_per_worker": 1}
    train = {"profiling": {"peak_tflops": 900}}
    site = Site(name="test", storage=tmp_path, ray={"address": "auto"}, resources=resources, train=train)

    def estimated(size, **changes):
        return training_estimate(config.model_copy(update=changes), sizes, site, 3, LIMITS, train=size)

    unknown = estimated(None)
    assert (unknown.num_updates, unknown.seconds) == (None, None)
    assert "time: known once the shards are made (`vico data build`)" in unknown.lines()
    by_tiles = estimated(TrainSize(text_tokens=100, tiles=400))  # 40 packs, 1.5 times, 6 per update
    assert by_tiles.num_updates == 10
    assert estimated(TrainSize(text_tokens=80_000, tiles=0)).num_updates == 20
    assert estimated(TrainSize(text_tokens=80_000, tiles=0), max_steps=7).num_updates == 7
    # Of 6 packs, the slowest of 4 ranks has 2.
    pack_seconds = 4 * (pack_tokens(config, sizes) + 1000) / unknown.tokens_per_second
    assert by_tiles.seconds == pytest.approx(10 * 2 * pack_seconds)
    assert any(line.endswith("for 10 updates at that speed") for line in by_tiles.lines())


def test_the_size_of_the_train_split_is_that_of_the_index(model, tmp_path):
    assert train_size(tmp_path) is None
    write_shard_folder(tmp_path, 30, 10, load_prompt_format(model))
    rows = load_index(tmp_path).table(["text_tokens", "num_tiles"], "train").to_pylist()
    assert 0 < len(rows) < 30
    assert train_size(tmp_path) == TrainSize(
        sum(row["text_tokens"] for row in rows), sum(row["num_tiles"] for row in rows)
    )
