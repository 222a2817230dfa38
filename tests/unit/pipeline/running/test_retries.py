"""Which failures are of which kind."""

import errno

import pytest

from cluster.site import Retries
from pipeline.running.retries import RetriesLeft, failure_kind
from vico.errors import UserError


class WorkersFailed(RuntimeError):
    pass


def caused(error, cause):
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
def test_kinds(error, kind):
    assert failure_kind(error) == kind


def test_an_error_of_ray_is_a_workers():
    from ray.exceptions import ActorDiedError

    assert failure_kind(ActorDiedError()) == "worker"


@pytest.mark.parametrize(
    "error, kind", [(OSError(errno.ESTALE, "stale"), "io"), (ValueError("a bug"), "error")]
)
def test_what_a_worker_raised_is_of_its_own_kind(error, kind):
    """As `map_tasks` hands it on: with Ray's envelope as the cause."""
    from ray.exceptions import RayTaskError

    from cluster.tasks import raise_cause

    with pytest.raises(type(error)) as raised:
        raise_cause(RayTaskError("call", "a traceback", error), 3, "item", "decoded")
    assert failure_kind(raised.value) == kind


def test_each_kind_has_its_own_number():
    left = RetriesLeft(Retries(io=1))
    assert left.take(ValueError()) is None
    assert left.take(OSError(errno.EIO, "gone")) == "io"
    assert left.take(OSError(errno.EIO, "gone")) is None
