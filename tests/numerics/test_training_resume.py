"""20 steps equal 10 steps, a resume and 10 more, bit for bit, at every ZeRO stage; other numbers of ranks
follow the same curve; a NaN, a SIGTERM and a hang end as they should.
"""

import gzip
import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from cluster.train_settings import MemorySettings
from stages.parts import Parts
from stages.training.checkpoints import checkpoints
from stages.training.faults import hung_ranks
from stages.training.metrics import read_metrics
from stages.training.speed.throughput import throughput_of
from stages.training.universal import convert_last_checkpoint
from tests.numerics.ranks import finish, start_ranks, stop_ranks, wait_for_ranks
from tests.numerics.training_case import CHECKPOINT_EVERY, NUM_STEPS
from tests.tiny_model import make_tiny_model
from tests.waiting import PATIENCE_S
from vico.errors import UserError

MODULE = "tests.numerics.training_case"
RELATIVE = 1e-5
HANG_TIMEOUT_S = 15
PROFILED = {"profile": True, "trace_steps": [3, 4], "peak_tflops": 0.1}
MEASURED_STEPS = 2
PARTS = ("reference", "vision", "language", "loss", "backward", "optimizer")


def scenario(name: str, zero_stage: int, attempt: int = 1, **more: object) -> str:
    return json.dumps({"name": name, "zero_stage": zero_stage, "attempt": attempt, **more})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("resume") / "model")


def started(
    model: Path, folder: Path, scenarios: list[str], world_size: int
) -> tuple[list[subprocess.Popen[bytes]], Path]:
    logs = folder / f"logs-{world_size}"
    return start_ranks(MODULE, [str(model), str(folder), *scenarios], logs, world_size), logs


def resumed(stage: int, dtype: str = "", **more: object) -> list[str]:
    """Return the scenarios of 20 undisturbed steps; and of 12 steps, then a resume from step 10."""
    prefix = f"{dtype}-" if dtype else ""
    fields = {"dtype": dtype} if dtype else {}
    return [
        scenario(f"{prefix}straight-{stage}", stage, **fields, **more),
        scenario(f"{prefix}resumed-{stage}", stage, stop_after=11, **fields),
        scenario(f"{prefix}resumed-{stage}", stage, attempt=2, **fields),
    ]


@pytest.fixture(scope="module")
def two_ranks(model, tmp_path_factory) -> Path:
    """Resumes on 2 ranks at each ZeRO stage, and at ZeRO-2 in bfloat16 and from tampered checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    wanted = resumed(2, "bfloat16")
    for stage in (1, 2, 3):
        profiling = PROFILED | ({"throughput_steps": MEASURED_STEPS} if stage == 1 else {})
        wanted += resumed(stage, site={"profiling": profiling})
    wanted.append(scenario("resumed-2", 2, attempt=3, tamper={"probe_loss": 1.0005}))
    wanted.append(scenario("resumed-2", 2, attempt=4, tamper={"kernels": "another device"}))
    finish(*started(model, folder, wanted, 2))
    return folder


@pytest.fixture(scope="module")
def other_settings(model, tmp_path_factory) -> Path:
    """More resumes on 2 ranks, for the slow tests: bfloat16 at ZeRO-1 and 3, offloaded, fused."""
    folder = tmp_path_factory.mktemp("other")
    wanted = [*resumed(1, "bfloat16"), *resumed(3, "bfloat16")]
    wanted.append(scenario("offloaded", 2, stop_after=11))
    offloads = {"memory": {"offload": "optimizer"}}
    wanted.append(scenario("offloaded", 2, attempt=2, site=offloads))
    wanted.append(scenario("offloaded-straight", 2, site=offloads))
    wanted.append(scenario("brought-back", 2, stop_after=11, site=offloads))
    wanted.append(scenario("brought-back", 2, attempt=2))
    for name, attempts in {"fused": [{}], "fused-resumed": [{"stop_after": 11}, {}]}.items():
        for attempt, more in enumerate(attempts, start=1):
            wanted.append(scenario(name, 3, attempt, fused=True, **more))
    finish(*started(model, folder, wanted, 2))
    return folder


def where_resumed(request: pytest.FixtureRequest, dtype: str, stage: int) -> Path:
    common = not dtype or stage == 2
    folder: Path = request.getfixturevalue("two_ranks" if common else "other_settings")
    return folder


def curve(folder: Path) -> dict[int, float]:
    return {step: metrics["loss"] for step, metrics in read_metrics(Parts(folder, 1))}


@pytest.mark.parametrize(
    ("dtype", "stage"),
    [
        ("", 1),
        ("", 2),
        ("", 3),
        pytest.param("bfloat16-", 1, marks=pytest.mark.slow),
        ("bfloat16-", 2),
        pytest.param("bfloat16-", 3, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_training_is_the_undisturbed_one_bit_for_bit(request, dtype, stage):
    folder = where_resumed(request, dtype, stage)
    straight, resumed = folder / f"{dtype}straight-{stage}", folder / f"{dtype}resumed-{stage}"
    first = (resumed / "attempts/1/metrics.jsonl").read_text().splitlines()
    second = [json.loads(line) for line in (resumed / "attempts/2/metrics.jsonl").read_text().splitlines()]
    assert json.loads(first[-1])["step"] == 11
    assert [entry["step"] for entry in second] == list(range(11, NUM_STEPS + 1))
    assert second[0]["metrics"]["resume_loss_change"] == 0
    assert curve(resumed) == curve(straight)
    expected = torch.load(straight / "weights-1.pt", weights_only=True)
    weights = torch.load(resumed / "weights-2.pt", weights_only=True)
    assert expected.keys() == weights.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_a_training_that_ran_out_of_memory_resumes_with_its_optimizer_offloaded(two_ranks, other_settings):
    """DeepSpeed's own AdamW continues with states that torch's has written."""
    losses = curve(other_settings / "offloaded")
    assert losses.keys() == set(range(1, NUM_STEPS + 1))
    assert_follows(losses, curve(two_ranks / "straight-2"))


@pytest.mark.slow
def test_a_training_resumes_without_offloading(other_settings):
    """torch's AdamW counts on from the steps of DeepSpeed's own, whose first steps round differently."""
    losses, straight = curve(other_settings / "brought-back"), curve(other_settings / "offloaded-straight")
    assert losses.keys() == set(range(1, NUM_STEPS + 1))
    assert all(losses[step] == straight[step] for step in range(1, CHECKPOINT_EVERY + 1))
    assert_follows(losses, straight)


@pytest.mark.slow
def test_a_training_with_the_fused_optimizer_resumes_bit_for_bit(two_ranks, other_settings):
    assert curve(other_settings / "fused-resumed") == curve(other_settings / "fused")
    assert_follows(curve(other_settings / "fused"), curve(two_ranks / "straight-3"))


def test_a_checkpoint_is_published_without_stopping_the_steps(two_ranks):
    parts = Parts(two_ranks / "straight-2", 1)
    assert [step for step, _ in checkpoints(parts)] == [10, 15]
    with_checkpoint = [step for step, metrics in read_metrics(parts) if "seconds_checkpoint" in metrics]
    assert with_checkpoint == [CHECKPOINT_EVERY, 2 * CHECKPOINT_EVERY, 3 * CHECKPOINT_EVERY]
    assert not list(parts.output.glob("checkpoints/.*"))


def test_a_checkpoint_that_gives_another_loss_than_the_stored_one_is_refused_on_every_rank(two_ranks):
    for rank in (0, 1):
        outcome = (two_ranks / f"resumed-2/outcome-{rank}.txt").read_text()
        assert (
            outcome.startswith("CheckpointDiffers: ") and "remove " in outcome and "step-0000015" in outcome
        )


def test_a_loss_computed_by_other_kernels_may_differ_by_their_rounding(two_ranks):
    """The loss for which the attempt before was refused is accepted from another device or compiled
    layers."""
    path = two_ranks / "resumed-2/attempts/4/metrics.jsonl"
    metrics = json.loads(path.read_text().splitlines()[0])["metrics"]
    assert metrics["resume_loss_change"] == pytest.approx(0.0005, rel=1e-2)


def elastic(
    model: Path, source: Path, folder: Path, stage: int, parts: list[tuple[int, dict]]
) -> dict[int, float]:
    """Return the losses after step 10 of 2 ranks in `source`, resumed by `parts`: (number of ranks, more of
    the scenario)."""
    dtype = next((f"{more['dtype']}-" for _, more in parts if "dtype" in more), "")
    name = f"{dtype}resumed-{stage}"  # its checkpoints contain this name
    kept = folder / name
    shutil.copytree(source / name, kept)
    shutil.rmtree(kept / "attempts")
    losses = {}
    for attempt, (world_size, more) in enumerate(parts, start=1):
        stage_parts = Parts(kept, attempt)
        for step, path in checkpoints(stage_parts):
            if step > 5 * (attempt + 1):
                shutil.rmtree(path)
        assert convert_last_checkpoint(stage_parts, world_size, MemorySettings(zero_stage=stage)) is not None
        finish(*started(model, folder, [scenario(name, stage, attempt, **more)], world_size))
        for line in (kept / f"attempts/{attempt}/metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            losses[entry["step"]] = entry["metrics"]["loss"]
            assert entry["metrics"].get("resume_loss_change", 0.0) <= RELATIVE
        assert '"resume_loss_change"' in (kept / f"attempts/{attempt}/metrics.jsonl").read_text()
    assert losses.keys() == set(range(11, NUM_STEPS + 1))
    return losses


def assert_follows(losses: dict[int, float], expected: dict[int, float]) -> None:
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=RELATIVE), f"step {step}"


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_two_then_one_then_three_ranks_follow_the_undisturbed_curve(model, two_ranks, stage, tmp_path):
    parts = [(1, {"stop_after": 16}), (3, {})]
    assert_follows(elastic(model, two_ranks, tmp_path, stage, parts), curve(two_ranks / f"straight-{stage}"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_other_ranks_resume_in_bfloat16_from_the_same_weights(request, model, stage, tmp_path):
    """The loss after each resume equals the one before it; then gradients are summed in another order and
    round differently."""
    parts = [(1, {"stop_after": 16, "dtype": "bfloat16"}), (3, {"dtype": "bfloat16"})]
    source = where_resumed(request, "bfloat16", stage)
    losses = elastic(model, source, tmp_path, stage, parts)
    expected = curve(source / f"bfloat16-straight-{stage}")
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=0.02), f"step {step}"


def test_a_checkpoint_of_another_zero_stage_is_refused(two_ranks):
    setting = r"train\.memory\.zero_stage"
    with pytest.raises(UserError, match=rf"{setting}=3, and .* was written at ZeRO-2, .* set {setting}=2"):
        convert_last_checkpoint(Parts(two_ranks / "resumed-2", 3), 2, MemorySettings(zero_stage=3))


def test_a_checkpoint_of_another_fingerprint_is_refused(two_ranks, tmp_path):
    shutil.copytree(two_ranks / "resumed-2", tmp_path / "other")
    with pytest.raises(UserError, match=r"step-.* for the fingerprint resumed-2, and this stage has other"):
        convert_last_checkpoint(Parts(tmp_path / "other", 3), 2, MemorySettings())


def test_some_updates_are_measured_before_the_training(two_ranks):
    metrics = throughput_of(two_ranks / "straight-1" / "attempts" / "1")
    assert metrics["num_steps"] == MEASURED_STEPS
    assert metrics["tokens_per_second"] > 0 and metrics["peak_memory_bytes"] > 1e8
    least = NUM_STEPS * metrics["seconds_step"] / 10
    assert metrics["seconds_predicted"] > max(least, metrics["seconds_validation"])


def test_a_profiled_step_names_its_parts_and_leaves_a_trace(two_ranks):
    folder = two_ranks / "straight-2" / "attempts" / "1"
    entries = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for metrics in entries:
        parts = [metrics[f"seconds_{part}"] for part in PARTS]
        assert all(seconds > 0 for seconds in parts)
        assert sum(parts) + metrics["seconds_data_wait"] <= metrics["seconds_step"]
        assert metrics["mfu"] == pytest.approx(metrics["tflops_per_rank"] / PROFILED["peak_tflops"])
        assert metrics["tokens_per_second"] > 0 and metrics["peak_memory_bytes"] > 1e8
    assert any(metrics["tiles_per_second"] > 0 for metrics in entries)
    with gzip.open(folder / "trace-steps-3-4.json.gz", "rt") as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert "aten::mm" in names
    assert not list(folder.glob("partial-*"))


@pytest.fixture(scope="module")
def faults(model, tmp_path_factory) -> Path:
    """On 2 ranks, rank 1 gets a NaN in a pack or a gradient, SIGTERM and a resume, then a hang."""
    folder = tmp_path_factory.mktemp("faults")
    wanted = [
        scenario("nan", 2, nan_at=7, rank=1),
        *(scenario(f"nan-gradient-{stage}", stage, nan_gradient_at=7, rank=1) for stage in (1, 2)),
        scenario("preempted", 2, sleep_s=0.15, validate_every=1),
        scenario("preempted", 2, attempt=2, validate_every=1),
        scenario("hang", 2, hang_at=7, rank=1, site={"restarts": {"hang_timeout_s": HANG_TIMEOUT_S}}),
    ]
    ranks, logs = started(model, folder, wanted, 2)
    step_file = folder / "preempted/rank-1-step.txt"
    wait_for_ranks(ranks, logs, lambda: step_file.exists() and int(step_file.read_text() or 0) >= 6)
    ranks[1].send_signal(signal.SIGTERM)
    assert [rank.wait(timeout=PATIENCE_S) for rank in ranks] == [1, 1]
    return folder


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_pack(faults):
    for rank in (0, 1):
        outcome = (faults / f"nan/outcome-{rank}.txt").read_text()
        assert outcome.startswith("Diverged: step 8: the loss is not finite (pack 1: nan, pack 3: nan)")
    assert [step for step, _ in checkpoints(Parts(faults / "nan", 1))] == [5]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_that_is_not_finite_stops_all_ranks(faults, stage):
    """The loss is finite. DeepSpeed would skip every such update, and the weights would never change."""
    folder = faults / f"nan-gradient-{stage}"
    for rank in (0, 1):
        outcome = (folder / f"outcome-{rank}.txt").read_text()
        assert outcome.startswith("Diverged: step 8: the gradient's norm is ")
    assert [step for step, _ in checkpoints(Parts(folder, 1))] == [5]


def test_sigterm_to_one_rank_publishes_a_checkpoint_and_the_resume_loses_no_step(faults, two_ranks):
    for rank in (0, 1):
        assert (
            (faults / f"preempted/outcome-{rank}.txt").read_text().startswith("Preempted: a rank got SIGTERM")
        )
    last = [
        json.loads(line) for line in (faults / "preempted/attempts/1/metrics.jsonl").read_text().splitlines()
    ]
    again = (faults / "preempted/attempts/2/metrics.jsonl").read_text().splitlines()
    validation, first = (json.loads(line) for line in again[:2])
    assert first["step"] == last[-1]["step"] + 1 < NUM_STEPS
    assert validation["step"] == last[-1]["step"] and validation["metrics"].keys() == {"validation_step"}
    reported = [metrics["validation_step"] for _, metrics in read_metrics(Parts(faults / "preempted", 2))]
    assert reported == list(range(1, NUM_STEPS + 1)), "every step has its validation, as without the notice"
    expected = torch.load(two_ranks / "straight-2/weights-1.pt", weights_only=True)
    weights = torch.load(faults / "preempted/weights-2.pt", weights_only=True)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_the_validation_of_the_step_at_notice_waits_for_the_resume(faults):
    """The checkpoint comes first, because only seconds may be left; the best policy is still chosen among all
    steps."""
    last = len((faults / "preempted/attempts/1/metrics.jsonl").read_text().splitlines())
    for rank in (0, 1):
        lines = (faults / f"preempted/validated-{rank}.txt").read_text().splitlines()
        attempts = [(int(line.split()[1]), int(line.split()[0])) for line in lines]
        assert attempts == [(step, 1 if step < last else 2) for step in range(1, NUM_STEPS + 1)]


def test_a_hung_rank_leaves_its_last_step_and_its_stacks(faults):
    lines = hung_ranks(faults / "hang/attempts/1", "start")
    assert [line.split(":")[0] for line in lines] == ["rank 0", "rank 1"]
    stacks = (faults / "hang/attempts/1/hung-start-1.txt").read_text()
    assert "last step 7" in stacks and "training_case.py" in stacks and "in batch" in stacks


def checkpoint_steps(folder: Path, attempt: int) -> list[int]:
    """Return the steps after which the attempt began a checkpoint."""
    lines = (folder / f"attempts/{attempt}/metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [entry["step"] for entry in entries if "seconds_checkpoint" in entry["metrics"]]


@pytest.mark.slow
def test_a_killed_training_resumes_from_the_last_checkpoint_by_time(model, tmp_path):
    """Rank 0's clock decides for all ranks: by rank 1's, a checkpoint would be due after every step."""
    by_time = {"checkpoints": {"every_steps": 1000, "every_s": 3}}
    more = {"site": by_time, "seconds_per_step": [1, 50]}
    ranks, logs = started(model, tmp_path, [scenario("killed", 2, sleep_s=0.2, **more)], 2)
    parts = Parts(tmp_path / "killed", 1)
    wait_for_ranks(ranks, logs, lambda: checkpoints(parts))
    stop_ranks(ranks)
    assert checkpoint_steps(tmp_path / "killed", 1)[0] == 4
    last = checkpoints(parts)[-1][0]
    again = [scenario("killed", 2, attempt=2, **more), scenario("straight", 2)]
    finish(*started(model, tmp_path, again, 2))
    resumed = [step for step in range(last + 1, NUM_STEPS) if (step - last) % 4 == 0]
    assert last % 4 == 0 and checkpoint_steps(tmp_path / "killed", 2) == resumed
    assert curve(tmp_path / "killed") == curve(tmp_path / "straight")


@pytest.mark.slow
def test_ranks_wait_for_a_hung_rank_as_long_as_configured(tmp_path):
    """This includes DeepSpeed's own process group, where torch's timeout would be 30 minutes (NCCL: 10)."""
    file = tmp_path / "waited.txt"
    ranks = start_ranks("tests.numerics.waiting_case", [str(file), "5"], tmp_path / "logs", 2)
    finish(ranks, tmp_path / "logs")
    seconds, _, error = file.read_text().partition(" ")
    assert float(seconds) > 4 and "5000ms" in error
