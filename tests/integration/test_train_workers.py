"""Ranks of a training that die, on a real local Ray."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch

from cluster.metric_lines import MetricsWriter
from cluster.ray_session import ray_session
from cluster.site import Site
from pipeline.results.attempt_metrics import GrowingMetrics
from pipeline.running.signals import StopSignals
from stages.parts import Parts
from stages.stops import Interrupted
from stages.training.faults import Preempted, stop_notice
from stages.training.ranks.phases import phase_items
from stages.training.ranks.rank_failures import FAILURE, PREEMPTION, Restarts, WorkersFailed, restart_counts
from stages.training.ranks.workers import run_workers
from tests.stage_context import StageContext, stage_context
from vico.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def ray():
    with ray_session(Site.model_validate({"ray": {"num_cpus": 2}})):
        yield


def set_site(context: StageContext, *, workers: int, **restarts: float) -> None:
    context.site = Site.model_validate(
        {
            "ray": {"num_cpus": 3},
            "resources": {"workers": workers},
            "train": {"restarts": restarts},
        }
    )


@pytest.fixture
def context(tmp_path) -> StageContext:
    """Two ranks that may be started twice."""
    context = stage_context("consistency", tmp_path, {})
    set_site(context, workers=2, max_failures=1)
    return context


def notes(context: StageContext) -> list[str]:
    return [report for report in context.reported if isinstance(report, str)]


def count_start(parts: Parts) -> int:
    """Count this start of this rank, wait until the other rank has counted it too, and return the number of
    starts.

    Without the wait, Ray ends a rank that has not yet reached this function when the other dies in it.
    """
    rank = torch.distributed.get_rank()
    with (parts.attempt_folder / f"starts-{rank}").open("a") as file:
        file.write("start\n")
    number, other = starts(parts, rank), parts.attempt_folder / f"starts-{1 - rank}"
    while not other.exists() or starts(parts, 1 - rank) < number:
        time.sleep(0.01)
    return number


def train(settings: tuple[Parts, str, int]) -> None:
    """Rank 0 publishes the policy; rank 1 dies before or after that, in the first `dies` starts."""
    parts, when, dies = settings
    rank = torch.distributed.get_rank()
    deaths = count_start(parts) <= dies
    if rank == 1 and deaths and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()
    if rank == 0:
        parts.partial("policy").write_text("a policy")
        parts.publish("policy")
    while not parts.done("policy"):
        time.sleep(0.01)
    if rank == 1 and deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def train_late(settings: tuple[Parts, int]) -> None:
    """Rank 1 dies; rank 0 reaches its next collective only after Ray has destroyed the process group."""
    parts, dies = settings
    rank = torch.distributed.get_rank()
    if count_start(parts) <= dies:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while torch.distributed.is_initialized():
            time.sleep(0.01)
    torch.distributed.barrier()
    if rank == 0:
        parts.partial("policy").write_text("a policy")
        parts.publish("policy")


def fail(parts: Parts) -> None:
    """Rank 1 has an error of its own, rank 0 waits for it."""
    count_start(parts)
    if torch.distributed.get_rank() == 1:
        raise ValueError("an error of its own")
    torch.distributed.barrier()


class DeadlyAtLaunch:
    """Settings that kill rank 1 when it unpickles them for the first time, while the ranks are launched."""

    def __init__(self, parts: Parts):
        self.parts = parts

    def __reduce__(self) -> tuple[Callable[[Parts], Parts], tuple[Parts]]:
        return _open_deadly, (self.parts,)


def _open_deadly(parts: Parts) -> Parts:
    if os.environ.get("RANK") == "1":  # Ray Train's controller unpickles them too, and has no rank
        with (parts.attempt_folder / "starts-1").open("a") as file:
            file.write("start\n")
        if starts(parts, 1) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return parts


def meet(parts: Parts) -> None:
    torch.distributed.barrier()


def train_until_notice(parts: Parts) -> None:
    """Make steps until there is a notice; the ranks then finish their step with a checkpoint, like the real
    loop."""
    rank = torch.distributed.get_rank()
    report = MetricsWriter(parts.attempt_folder / "metrics.jsonl") if rank == 0 else None
    with stop_notice(parts.attempt_folder, rank) as notice:
        for step in range(1, 10**6):
            stop = torch.tensor(float(notice.given()))
            torch.distributed.all_reduce(stop)
            if report:
                report.append(step, {"loss": 1.0})
            if stop:
                raise Preempted(f"step {step} is done and its checkpoint published")
            time.sleep(0.02)


def keep_slowly(parts: Parts) -> None:
    for _ in phase_items(range(10**6), 2 * 10**6, "shards", parts.attempt_folder, may_stop=True):
        time.sleep(0.02)


def load_too_long(parts: Parts) -> None:
    """In the first start, rank 1 gets SIGTERM while it loads its models, and is killed before it trains."""
    number = count_start(parts)
    if torch.distributed.get_rank() == 1 and number == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def vanish(settings: tuple[Parts, bool]) -> None:
    """In the first start, rank 1 loses its network before its process ends, so that Ray has not seen it
    end."""
    parts, noticed = settings
    number = count_start(parts)
    if torch.distributed.get_rank() == 1 and number == 1:
        if noticed:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        torch.distributed.destroy_process_group()  # closes the connections
        time.sleep(600)
    torch.distributed.barrier()


def starts(parts: Parts, rank: int) -> int:
    return len((parts.attempt_folder / f"starts-{rank}").read_text().splitlines())


def logs(parts: Parts) -> str:
    """Return the logs of both ranks: Ray may end the later one before it has logged its reason."""
    return "".join(path.read_text() for path in sorted(parts.attempt_folder.glob("rank-*.log")))


@pytest.mark.slow
def test_a_rank_that_dies_after_the_last_part_causes_no_restart(context):
    """A restart would train again from the last checkpoint and then fail, because the policy is published."""
    run_workers(train, (context.parts, "after", 1), context, num_steps=1, last_part="policy")
    assert (context.parts.output / "policy").read_text() == "a policy"
    assert starts(context.parts, 0) == starts(context.parts, 1) == 1


@pytest.mark.slow
def test_deaths_are_limited(context):
    with pytest.raises(WorkersFailed, match=r"worker failure: .*train.restarts.max_failures=1 is used up"):
        run_workers(train, (context.parts, "before", 9), context, num_steps=1, last_part="policy")
    assert starts(context.parts, 1) == 2
    assert restart_counts(context.parts) == {"worker_failures": 2, "preemptions": 0}
    again = Restarts(Parts(context.parts.folder, 2))  # another attempt continues the count
    again.add(PREEMPTION)
    again.add(FAILURE)
    assert restart_counts(context.parts) == {"worker_failures": 3, "preemptions": 1}
    files = GrowingMetrics(context.parts.folder / "attempts", lambda path: float("inf"))
    restarts = [line.content for line in files.unread(100) if "restarts" in line.path.name]
    assert [line.step for line in restarts] == [1, 2, 3, 4], "MLflow takes each step of a metric once"
    assert restarts[-1].metrics == {"num_worker_failures": 3.0, "num_preemptions": 1.0}


@pytest.mark.slow
def test_a_rank_that_computes_while_another_dies_has_no_error_of_its_own(context):
    """Its next collective raises a ValueError of torch (the process group is gone), not a lost connection.
    All ranks start again and make the last part."""
    run_workers(train_late, (context.parts, 1), context, num_steps=1, last_part="policy")
    assert (context.parts.output / "policy").read_text() == "a policy"
    assert starts(context.parts, 0) == starts(context.parts, 1) == 2


@pytest.mark.slow
def test_a_rank_that_dies_while_the_ranks_are_launched_frees_its_resources(context):
    """Ray forgets that start, and the two ranks hold all CPUs, which the next start needs."""
    run_workers(meet, DeadlyAtLaunch(context.parts), context, num_steps=1)
    assert starts(context.parts, 1) == 2


@pytest.mark.slow
def test_an_error_of_a_rank_is_not_retried(context):
    with pytest.raises(WorkersFailed, match=r"^rank 1: ValueError: an error of its own; see .*/rank-1.log$"):
        run_workers(fail, context.parts, context, num_steps=1)
    assert starts(context.parts, 0) == starts(context.parts, 1) == 1


@pytest.mark.slow
def test_an_error_of_the_context_ends_the_training_after_its_step(context):
    """A lost lease, or a store that refuses writes, is noticed at once and not days later at the end."""
    started = context.parts.attempt_folder / "metrics.jsonl"

    def check() -> None:
        if started.exists():
            raise UserError("403: the store takes nothing more")

    context.check = check
    with pytest.raises(UserError, match="the store takes nothing more"):
        run_workers(train_until_notice, context.parts, context, num_steps=10**6)
    assert "is done and its checkpoint published" in logs(context.parts)
    assert restart_counts(context.parts) == {"worker_failures": 0, "preemptions": 0}


def test_a_stop_does_not_wait_for_all_that_precedes_the_first_step(context):
    """What frozen parts compute is kept shard by shard, before the first step, which may take an hour."""

    def check() -> None:
        if any(report[1:] == (2 * 10**6, "shards") for report in context.reported):
            raise UserError("the lease is lost")

    context.check = check
    with pytest.raises(UserError, match="the lease is lost"):
        run_workers(keep_slowly, context.parts, context, num_steps=10)
    assert "got a stop notice; its shards so far are kept" in logs(context.parts)
    assert restart_counts(context.parts) == {"worker_failures": 0, "preemptions": 0}


@pytest.mark.usefixtures("terminal_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_the_driver_leaves_the_ranks_time_for_their_checkpoint(context, number):
    """A job server or Ctrl-C stops a run this way; Ray alone would end the ranks within a step."""
    started = context.parts.attempt_folder / "metrics.jsonl"

    def stop() -> None:
        while not started.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    with StopSignals() as signals:
        context.check = signals.check
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises(Interrupted, match=number.name):
            run_workers(train_until_notice, context.parts, context, num_steps=10**6, last_part="policy")
    assert "is done and its checkpoint published" in logs(context.parts)
    assert notes(context) == [
        f"{number.name}: the ranks end their step and publish a checkpoint; again: all end at once"
    ]


@pytest.mark.slow
def test_a_rank_that_is_taken_away_while_it_loads_counts_as_preempted(context):
    run_workers(load_too_long, context.parts, context, num_steps=1)
    assert starts(context.parts, 1) == 2
    assert restart_counts(context.parts) == {"worker_failures": 0, "preemptions": 1}


@pytest.mark.slow
@pytest.mark.parametrize("noticed", [True, False])
def test_a_rank_whose_end_only_its_peer_reports_is_preempted_only_after_a_notice(context, noticed):
    run_workers(vanish, (context.parts, noticed), context, num_steps=1)
    assert "rank 0 ERROR" in logs(context.parts)
    counts = {"worker_failures": 1 - noticed, "preemptions": int(noticed)}
    assert restart_counts(context.parts) == counts


@pytest.mark.slow
def test_missing_resources_are_noted_and_the_wait_for_them_is_limited(context, monkeypatch):
    """As after the loss of a node that is not replaced."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    set_site(context, workers=3, start_timeout_s=5.0)
    with pytest.raises(
        WorkersFailed,
        match=r"no room for 3 ranks of .* train\.restarts\.start_timeout_s=5 is used up; run the same",
    ):
        run_workers(meet, context.parts, context, num_steps=1)
    (note,) = notes(context)
    assert note.startswith("no room for 3 ranks of {'CPU': ")
    assert restart_counts(context.parts) == {"worker_failures": 0, "preemptions": 0}


def test_a_signal_during_the_wait_for_resources_does_not_wait_for_that_start(context, monkeypatch):
    """This is the last test here: the thread that waits within Ray ends with the session, as when a run
    ends."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    set_site(context, workers=3)
    with StopSignals() as signals:
        context.check = signals.check
        timer = threading.Timer(5, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        began = time.monotonic()
        try:
            with pytest.raises(Interrupted, match="SIGTERM"):
                run_workers(meet, context.parts, context, num_steps=1, last_part="policy")
        finally:
            timer.cancel()  # without the handler, the signal would end this process
        assert time.monotonic() - began < 300, "it waited for the start that Ray was trying"
