"""The kinds of failures, and how often each kind is tried again."""

import errno

import pytest

from cluster.settings.blocks import Retries
from pipeline.running.retries import RetriesLeft, failure_kind
from vico.errors import UserError


class WorkersFailed(RuntimeError):
    pass


def caused(error, cause):
    """Return the error with a cause, as `raise error from cause` sets it."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, kind",
    [
        (ValueError("a bug"), "error"),
        (OSError(errno.EIO, "gone"), "io"),
        (ConnectionResetError(), "io"),
        (OSError(errno.ENOSPC, "full"), None),
        (caused(RuntimeError("task"), OSError(errno.ENOSPC, "full")), None),
        (UserError("num_shards=2"), None),
        (MemoryError(), "memory"),
        (RuntimeError("CUDA out of memory"), "memory"),
        (WorkersFailed("worker failure: ..."), "worker"),
        (caused(RuntimeError("wrapped"), WorkersFailed("a worker died")), "worker"),
    ],
)
def test_the_kind_of_a_failure_decides_whether_it_is_tried_again(error, kind):
    assert failure_kind(error) == kind


def test_an_error_of_ray_itself_is_a_lost_worker():
    from ray.exceptions import ActorDiedError

    assert failure_kind(ActorDiedError()) == "worker"


@pytest.mark.parametrize(
    "error, kind", [(OSError(errno.ESTALE, "stale"), "io"), (ValueError("a bug"), "error")]
)
def test_an_error_raised_in_a_worker_keeps_its_kind(error, kind):
    """`map_tasks` raises it with Ray's wrapper as the cause."""
    from ray.exceptions import RayTaskError

    from cluster.tasks import Submitted, raise_cause

    with pytest.raises(type(error)) as raised:
        raise_cause(RayTaskError("call", "a traceback", error), Submitted(3, "item"), "decoded")
    assert failure_kind(raised.value) == kind


def test_each_kind_of_failure_has_its_own_number_of_retries():
    left = RetriesLeft(Retries(io=1))
    assert left.take(ValueError()) is None
    assert left.take(OSError(errno.EIO, "gone")) == "io"
    assert left.take(OSError(errno.EIO, "gone")) is None
