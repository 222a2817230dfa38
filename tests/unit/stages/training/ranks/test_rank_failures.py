"""How the driver judges ranks that ended, and when it starts them again."""

import errno
from pathlib import Path

import pytest
import torch

from data_prep.shards.open_shards import ShardMismatch
from pipeline.running.retries import failure_kind
from stages.training.faults import Diverged, Preempted, remove_notices, write_notice
from stages.training.ranks.rank_failures import WorkersFailed, cause, leave_failure, remove_failures
from vico.errors import Unreachable, UserError


def leave(folder: Path, rank: int, error: Exception) -> None:
    """Write what a rank leaves that ends in this exception, which is raised first, for its traceback."""
    try:
        raise error
    except Exception as raised:
        leave_failure(folder, rank, raised)


class RayError(RuntimeError):
    """An error as Ray raises it, with the ranks that its poll found ended."""

    def __init__(self, *ranks: int):
        super().__init__("Ray's own\nmore")
        self.worker_failures = dict.fromkeys(ranks)


def test_the_cause_of_an_end_is_found_in_what_ranks_left(tmp_path):
    error = RuntimeError("Ray's own\nmore")
    assert cause(tmp_path, error) == ("worker failure", "a worker died (more)")
    leave(tmp_path, 0, RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert cause(tmp_path, error)[0] == "worker failure"
    stacks = tmp_path / "stacks-1.txt"
    stacks.write_text("rank 1: last step 7, no further one within 5 s\n")
    assert "a worker died" in cause(tmp_path, error)[1]  # the watchdog's time did not run out
    stacks.write_text(stacks.read_text() + "Timeout!\n")
    kept = tmp_path / "hung-ray-train-0-1.txt"
    assert cause(tmp_path, error, "ray-train-0") == (
        "worker failure",
        f"rank 1: last step 7, no further one within 5 s (stacks in {kept})",
    )
    assert "Timeout!" in kept.read_text() and not stacks.exists(), "the next start has stacks of its own"
    leave(tmp_path, 1, Preempted("step 7 is done"))
    assert cause(tmp_path, error) == ("preemption", "step 7 is done")
    leave(tmp_path, 2, Diverged("not finite"))
    assert cause(tmp_path, error)[0] == "preemption"  # it came after Ray had ended the ranks
    with pytest.raises(Diverged, match=r"^rank 2: Diverged: not finite; see .*/rank-2\.log$") as raised:
        cause(tmp_path, RayError(1, 2))
    assert failure_kind(raised.value) is None, "with retries.worker the numbers would only go wrong again"
    leave(tmp_path, 1, ShardMismatch("shard 3 has other bytes"))
    with pytest.raises(UserError, match=r"^shard 3 has other bytes$"):
        cause(tmp_path, RayError(1, 2))
    remove_failures(tmp_path)
    leave(tmp_path, 0, Unreachable("the store gave no answer"))
    with pytest.raises(Unreachable) as raised:
        cause(tmp_path, RayError(0))
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
def test_the_ranks_start_again_after_a_fault_of_the_machine(tmp_path, error):
    leave(tmp_path, 1, error)
    kind, reason = cause(tmp_path, RayError(0, 1))
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
def test_the_ranks_do_not_start_again_after_an_error_of_their_own(tmp_path, error):
    leave(tmp_path, 1, error)
    with pytest.raises(WorkersFailed, match=f"^rank 1: {type(error).__name__}: "):
        cause(tmp_path, RayError(0, 1))


def test_a_rank_that_dies_silently_after_a_notice_was_preempted(tmp_path):
    """Its node was taken away while it loaded the models, or in less time than a step takes."""
    write_notice(tmp_path, 1, "SIGTERM\n")
    assert cause(tmp_path, RayError(0, 1)) == (
        "preemption",
        "rank 1 got SIGTERM, or its node was taken away, and ended before its step",
    )
    remove_notices(tmp_path)
    assert cause(tmp_path, RayError(0, 1))[0] == "worker failure"


def test_a_stop_of_the_others_by_ray_does_not_make_a_death_a_preemption(tmp_path):
    """Rank 0 was killed while both kept what frozen parts compute; rank 1 then ended its shard."""
    leave(tmp_path, 1, Preempted("rank 1 got a stop notice"))
    assert cause(tmp_path, RayError(0))[0] == "worker failure"
    assert cause(tmp_path, RayError(0, 1))[0] == cause(tmp_path, RayError(1))[0] == "preemption"
    write_notice(tmp_path, 1, "SIGTERM\n")
    leave(tmp_path, 0, RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert cause(tmp_path, RayError(0)) == ("preemption", "rank 1 got a stop notice"), (
        "its peer saw the notice"
    )


@pytest.mark.parametrize("first, kind", [("notice", "preemption"), ("error", "worker failure")])
def test_a_notice_of_a_rank_that_ray_does_not_name_counts_if_it_came_before_its_peer_failed(
    tmp_path, first, kind
):
    """Ray's poll saw only the peer end; the SIGTERM that Ray then sends to the other ranks is not a
    notice."""
    if first == "notice":
        write_notice(tmp_path, 1, "SIGTERM\n")
    leave(tmp_path, 0, RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    write_notice(tmp_path, 1, "SIGTERM, of Ray\n")
    assert cause(tmp_path, RayError(0))[0] == kind
