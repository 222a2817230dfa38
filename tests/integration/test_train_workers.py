"""Ranks of a training on a real local Ray, that die."""

import os
import signal
import threading
import time

import pytest
import torch

from cluster.ray_session import ray_session
from cluster.site import Site
from pipeline.results.metric_lines import MetricFiles
from pipeline.running.signals import StopSignals
from stages.parts import Parts
from stages.stops import Interrupted
from stages.training.faults import Preempted, stop_notice
from stages.training.metrics import MetricsFile
from stages.training.rank_failures import FAILURE, PREEMPTION, Restarts, WorkersFailed, restart_counts
from stages.training.workers import run_workers
from tests.stage_context import stage_context
from vico.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def ray():
    with ray_session(Site.model_validate({"ray": {"num_cpus": 2}})):
        yield


@pytest.fixture
def context(tmp_path):
    """Two ranks that may be started twice."""
    context = stage_context("consistency", tmp_path, {})
    train = context.site.train.model_copy(update={"max_failures": 1})
    context.site = context.site.model_copy(update={"train": train})
    return context


def count_start(parts) -> int:
    """This rank's number of starts, this one counted, once the other has counted it too: Ray ends a rank that
    is still on its way to this function when another dies in it."""
    rank = torch.distributed.get_rank()
    with (parts.attempt_folder / f"starts-{rank}").open("a") as file:
        file.write("start\n")
    number, other = starts(parts, rank), parts.attempt_folder / f"starts-{1 - rank}"
    while not other.exists() or starts(parts, 1 - rank) < number:
        time.sleep(0.01)
    return number


def train(settings: tuple) -> None:
    """Rank 0 publishes the policy; rank 1 dies before that or after it, every time or the first time."""
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


def train_late(settings: tuple) -> None:
    """Rank 1 dies; rank 0 comes to its next collective only when Ray has taken the process group away."""
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


def fail(parts) -> None:
    """Rank 1 has a fault of its own, rank 0 waits for it."""
    count_start(parts)
    if torch.distributed.get_rank() == 1:
        raise ValueError("a fault of its own")
    torch.distributed.barrier()


class DeadlyAtLaunch:
    """Settings that, the first time, kill the rank 1 that opens them: it dies while ranks are launched."""

    def __init__(self, parts):
        self.parts = parts

    def __reduce__(self):
        return _open_deadly, (self.parts,)


def _open_deadly(parts):
    if os.environ.get("RANK") == "1":  # Ray Train's controller opens them too, and has no rank
        with (parts.attempt_folder / "starts-1").open("a") as file:
            file.write("start\n")
        if starts(parts, 1) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return parts


def meet(parts) -> None:
    torch.distributed.barrier()


def train_until_told(parts) -> None:
    """Steps without end; told to stop, the ranks end their step and have a checkpoint, as `train` does."""
    rank = torch.distributed.get_rank()
    report = MetricsFile(parts.attempt_folder / "metrics.jsonl") if rank == 0 else None
    with stop_notice(parts.attempt_folder, rank) as notice:
        for step in range(1, 10**6):
            stop = torch.tensor(float(notice.given()))
            torch.distributed.all_reduce(stop)
            if report:
                report.append(step, {"loss": 1.0})
            if stop:
                raise Preempted(f"step {step} is done and its checkpoint published")
            time.sleep(0.02)


def load_too_long(parts) -> None:
    """The first time, rank 1 gets SIGTERM while it loads its models, and is killed before it trains."""
    number = count_start(parts)
    if torch.distributed.get_rank() == 1 and number == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def vanish(settings: tuple) -> None:
    """The first time, rank 1's network goes before its process, of which Ray then has heard nothing."""
    parts, noticed = settings
    number = count_start(parts)
    if torch.distributed.get_rank() == 1 and number == 1:
        if noticed:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        torch.distributed.destroy_process_group()  # closes the connections
        time.sleep(600)
    torch.distributed.barrier()


def starts(parts, rank: int) -> int:
    return len((parts.attempt_folder / f"starts-{rank}").read_text().splitlines())


def logs(parts) -> str:
    """Of both ranks: Ray may end the later of two that stop before it has said why."""
    return "".join(path.read_text() for path in sorted(parts.attempt_folder.glob("rank-*.log")))


def test_a_rank_that_dies_after_the_last_part_is_not(context):
    """The training would be done again from its last checkpoint, and its policy refused: it is there."""
    run_workers(train, (context.parts, "after", 1), context, num_steps=1, last_part="policy")
    assert (context.parts.output / "policy").read_text() == "a policy"
    assert starts(context.parts, 0) == starts(context.parts, 1) == 1


def test_deaths_are_limited(context):
    with pytest.raises(WorkersFailed, match=r"worker failure: .*train.max_failures=1 is used up"):
        run_workers(train, (context.parts, "before", 9), context, num_steps=1, last_part="policy")
    assert starts(context.parts, 1) == 2
    assert restart_counts(context.parts) == {"worker_failures": 2, "preemptions": 0}
    again = Restarts(Parts(context.parts.folder, 2))  # another attempt counts on
    again.add(PREEMPTION)
    again.add(FAILURE)
    assert restart_counts(context.parts) == {"worker_failures": 3, "preemptions": 1}
    files = MetricFiles(context.parts.folder / "attempts", lambda path: float("inf"))
    told = [(line.step, dict(line.metrics)) for line in files.unread(100) if "restarts" in line.path.name]
    assert [step for step, _ in told] == [1, 2, 3, 4], "MLflow takes each step of a metric once"
    assert told[-1][1] == {"num_worker_failures": 3.0, "num_preemptions": 1.0}


def test_a_rank_in_mid_computation_when_another_dies_is_no_fault_of_its_own(context):
    """At its next collective it finds its process group gone: a ValueError of torch, no lost connection. All
    ranks are started again, and the last part is made."""
    run_workers(train_late, (context.parts, 1), context, num_steps=1, last_part="policy")
    assert (context.parts.output / "policy").read_text() == "a policy"
    assert starts(context.parts, 0) == starts(context.parts, 1) == 2


def test_a_rank_that_dies_while_the_ranks_are_launched_leaves_its_places(context):
    """Ray loses sight of that start: the places of the two ranks are all there are, the next start needs
    them."""
    run_workers(meet, DeadlyAtLaunch(context.parts), context, num_steps=1)
    assert starts(context.parts, 1) == 2


def test_a_fault_of_a_rank_is_not_tried_again(context):
    with pytest.raises(WorkersFailed, match=r"^rank 1: ValueError: a fault of its own; see .*/rank-1.log$"):
        run_workers(fail, context.parts, context, num_steps=1)
    assert starts(context.parts, 0) == starts(context.parts, 1) == 1


def test_what_the_context_finds_ends_the_training_with_its_step_done(context):
    """A lost lease, or a store that takes nothing more: not noticed days later, at the end."""
    started = context.parts.attempt_folder / "metrics.jsonl"

    def check():
        if started.exists():
            raise UserError("403: the store takes nothing more")

    context.check = check
    with pytest.raises(UserError, match="the store takes nothing more"):
        run_workers(train_until_told, context.parts, context, num_steps=10**6)
    assert "is done and its checkpoint published" in logs(context.parts)
    assert restart_counts(context.parts) == {"worker_failures": 0, "preemptions": 0}


@pytest.mark.usefixtures("terminal_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_driver_leaves_the_ranks_time_for_their_checkpoint(context, number):
    """As a job server stops a run, or Ctrl-C; Ray would end the ranks in mid-step."""
    started = context.parts.attempt_folder / "metrics.jsonl"

    def stop() -> None:
        while not started.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    with StopSignals() as signals:
        context.check = signals.check
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises(Interrupted, match=number.name):
            run_workers(train_until_told, context.parts, context, num_steps=10**6, last_part="policy")
    assert "is done and its checkpoint published" in logs(context.parts)
    said = [line for line in context.reported if isinstance(line, str)]
    assert said == [
        f"{number.name}: the ranks end their step and publish a checkpoint; again: all end at once"
    ]


def test_a_rank_that_is_taken_while_it_loads_is_preempted_and_no_failure(context):
    run_workers(load_too_long, context.parts, context, num_steps=1)
    assert starts(context.parts, 1) == 2
    assert restart_counts(context.parts) == {"worker_failures": 0, "preemptions": 1}


@pytest.mark.parametrize("noticed", [True, False])
def test_a_rank_whose_peer_alone_tells_of_its_end_is_preempted_only_after_notice(context, noticed):
    run_workers(vanish, (context.parts, noticed), context, num_steps=1)
    assert "rank 0 ERROR" in logs(context.parts)
    counts = {"worker_failures": 1 - noticed, "preemptions": int(noticed)}
    assert restart_counts(context.parts) == counts


def test_places_that_do_not_come_are_said_and_waited_for_only_so_long(context, monkeypatch):
    """As after the loss of a node that nothing replaces."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    train = context.site.train.model_copy(update={"start_timeout_s": 5.0})
    resources = context.site.resources.model_copy(update={"workers": 3})
    context.site = context.site.model_copy(update={"train": train, "resources": resources})
    with pytest.raises(
        WorkersFailed, match=r"no places for 3 ranks of .* train\.start_timeout_s=5 is used up; give the same"
    ):
        run_workers(meet, context.parts, context, num_steps=1)
    said = [line for line in context.reported if isinstance(line, str)]
    assert len(said) == 1 and said[0].startswith("no places for 3 ranks of {'CPU': ")
    assert restart_counts(context.parts) == {"worker_failures": 0, "preemptions": 0}


def test_a_signal_while_places_are_waited_for_ends_at_once(context):
    """The last test here: what waits within Ray then ends with the session, as when a run ends."""
    resources = context.site.resources.model_copy(update={"workers": 3})
    context.site = context.site.model_copy(update={"resources": resources})
    with StopSignals() as signals:
        context.check = signals.check
        threading.Timer(5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        with pytest.raises(Interrupted, match="SIGTERM"):
            run_workers(meet, context.parts, context, num_steps=1, last_part="policy")
        assert time.monotonic() - began < 20
