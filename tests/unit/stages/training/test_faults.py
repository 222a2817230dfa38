"""What a training makes of odd losses and gradients, and what the driver makes of ranks that ended."""

import errno
import json
import math

import pytest
import torch

from cluster.site import TrainSettings
from data_prep.shards.reader import ShardMismatch
from pipeline.running.retries import failure_kind
from stages.training.faults import Diverged, LossWatch, Preempted, remove_notices, write_notice
from stages.training.rank_failures import WorkersFailed, cause, leave_failure, remove_failures
from vico.errors import Unreachable, UserError


def watched(losses, grad_norms=None, skipped=None, **settings):
    """The counts of the last step after watching all of them."""
    watch = LossWatch(TrainSettings(**settings))
    for step, loss in enumerate(losses, start=1):
        norm = grad_norms[step - 1] if grad_norms else 1.0
        counts = watch.counts(step, loss, norm, skipped[step - 1] if skipped else 0)
    return counts


def test_a_spike_is_a_loss_far_over_the_median_once_there_is_one():
    assert watched([9.0, *[1.0] * 10, 9.9])["loss_spikes"] == 0
    assert watched([*[1.0] * 10, 10.1, 1.0, 10.1])["loss_spikes"] == 2


def test_spikes_past_the_budget_stop_the_training():
    losses = [*[1.0] * 10, 11.0, 11.0]
    assert watched(losses, max_loss_spikes=2)["loss_spikes"] == 2
    with pytest.raises(Diverged, match=r"step 12: train\.max_loss_spikes=1 is passed \(2\)"):
        watched(losses, max_loss_spikes=1)


def test_skipped_updates_are_counted_and_have_a_budget():
    losses, norms, skipped = [1.0] * 3, [1.0, math.inf, math.inf], [0, 1, 2]
    assert watched(losses, norms, skipped, max_skipped_steps=2)["skipped_steps"] == 2
    with pytest.raises(Diverged, match=r"step 3: train\.max_skipped_steps=1 is passed \(2\)"):
        watched(losses, norms, skipped, max_skipped_steps=1)


def test_budgets_are_of_the_whole_training_however_often_it_is_started():
    settings = TrainSettings(max_loss_spikes=2, max_skipped_steps=2)
    first = LossWatch(settings)
    for step, loss in enumerate([*[1.0] * 10, 11.0], start=1):
        first.counts(step, loss, 1.0, 0)
    assert first.counts(12, 1.0, math.inf, 1) == {"loss_spikes": 1.0, "skipped_steps": 1.0}
    state = json.loads(json.dumps(first.state))  # as a checkpoint keeps it
    # the engine's own count goes on from the checkpoint, or begins anew
    for skipped_before in (0, 1):
        again = LossWatch(settings, state, skipped_before)
        counts = again.counts(13, 11.0, math.inf, skipped_before + 1)
        assert counts == {"loss_spikes": 2.0, "skipped_steps": 2.0}, "the window of losses is there at once"
        with pytest.raises(Diverged, match=r"train\.max_skipped_steps=2 is passed \(3\)"):
            again.counts(14, 1.0, math.inf, skipped_before + 2)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_stops_the_training_unless_some_may_be_left_out(norm):
    with pytest.raises(Diverged, match=f"step 2: the gradient's norm is {norm}"):
        watched([1.0, 1.0], [1.0, norm], [0, 1])
    with pytest.raises(Diverged, match=f"step 2: the gradient's norm is {norm}"):  # and was not left out
        watched([1.0, 1.0], [1.0, norm], max_skipped_steps=5)


def left(folder, rank, error):
    """What a rank leaves that ends in this exception; raised, as there, for its traceback."""
    try:
        raise error
    except Exception as raised:
        leave_failure(folder, rank, raised)


def ended(*ranks):
    error = RuntimeError("Ray's own\nmore")
    error.worker_failures = dict.fromkeys(ranks)
    return error


def test_the_cause_of_an_end_is_told_from_what_ranks_left(tmp_path):
    error = RuntimeError("Ray's own\nmore")
    assert cause(tmp_path, error) == ("worker failure", "a worker died (more)")
    left(tmp_path, 0, RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert cause(tmp_path, error)[0] == "worker failure"
    stacks = tmp_path / "stacks-1.txt"
    stacks.write_text("rank 1: last step 7, no further one within 5 s\n")
    assert "a worker died" in cause(tmp_path, error)[1]  # its time did not run out
    stacks.write_text(stacks.read_text() + "Timeout!\n")
    kept = tmp_path / "hung-ray-train-0-1.txt"
    assert cause(tmp_path, error, "ray-train-0") == (
        "worker failure",
        f"rank 1: last step 7, no further one within 5 s (stacks in {kept})",
    )
    assert "Timeout!" in kept.read_text() and not stacks.exists(), "the next start has stacks of its own"
    left(tmp_path, 1, Preempted("step 7 is done"))
    assert cause(tmp_path, error) == ("preemption", "step 7 is done")
    left(tmp_path, 2, Diverged("not finite"))
    assert cause(tmp_path, error)[0] == "preemption"  # it came after Ray had ended the ranks
    with pytest.raises(Diverged, match=r"^rank 2: Diverged: not finite; see .*/rank-2\.log$") as raised:
        cause(tmp_path, ended(1, 2))
    assert failure_kind(raised.value) is None, "retries.worker would let it go wrong again"
    left(tmp_path, 1, ShardMismatch("shard 3 has other bytes"))
    with pytest.raises(UserError, match=r"^shard 3 has other bytes$"):
        cause(tmp_path, ended(1, 2))
    remove_failures(tmp_path)
    left(tmp_path, 0, Unreachable("the store gave no answer"))
    with pytest.raises(Unreachable) as raised:
        cause(tmp_path, ended(0))
    assert failure_kind(raised.value) == "io"


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        TimeoutError("the file server is slow"),
    ],
)
def test_a_fault_of_the_machine_is_mended_by_another_start(tmp_path, error):
    left(tmp_path, 1, error)
    kind, reason = cause(tmp_path, ended(0, 1))
    assert kind == "worker failure" and reason.startswith(f"rank 1: {type(error).__name__}: ")


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        FileNotFoundError(errno.ENOENT, "no such file"),
        KeyError("a bug"),
    ],
)
def test_a_fault_of_its_own_is_not(tmp_path, error):
    left(tmp_path, 1, error)
    with pytest.raises(WorkersFailed, match=f"^rank 1: {type(error).__name__}: "):
        cause(tmp_path, ended(0, 1))


def test_a_rank_that_dies_without_a_word_after_notice_was_preempted(tmp_path):
    """Its node was taken while it loaded the models, or faster than a step takes."""
    write_notice(tmp_path, 1, "SIGTERM\n")
    assert cause(tmp_path, ended(0, 1)) == (
        "preemption",
        "rank 1 got SIGTERM, or its node was taken away, and ended before its step",
    )
    remove_notices(tmp_path)
    assert cause(tmp_path, ended(0, 1))[0] == "worker failure"


@pytest.mark.parametrize("first, kind", [("notice", "preemption"), ("word", "worker failure")])
def test_notice_of_a_rank_that_ray_does_not_name_counts_if_it_came_before_its_peer_was_lost(
    tmp_path, first, kind
):
    """Ray saw only the peer end, by its poll; the SIGTERM that it sends to what is left is no notice."""
    if first == "notice":
        write_notice(tmp_path, 1, "SIGTERM\n")
    left(tmp_path, 0, RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    write_notice(tmp_path, 1, "SIGTERM, of Ray\n")
    assert cause(tmp_path, ended(0))[0] == kind
