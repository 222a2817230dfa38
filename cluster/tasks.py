"""Map a function, or a pool of models, over items on Ray: bounded, in the order of completion, with retries.

Stages call it inside a `ray_session`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NoReturn

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from cluster.site import Site
from cluster.sources.reports import accept
from cluster.workers import ActorWorkers, Item, Result, TaskWorkers, Workers
from vico.errors import one_line

logger = logging.getLogger(__name__)
WORKER_LOST = (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)
CHECK_EVERY_S = 1.0


class WorkerLost(RuntimeError):
    """The worker process of an item died more often than `resources.max_retries` allows."""


@dataclass(frozen=True)
class Submitted(Generic[Item]):
    """An item that a worker has: its number, and how many workers died on it before."""

    number: int
    item: Item
    num_deaths: int = 0


def map_tasks(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    site: Site,
    in_flight: int | None = None,
    check: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Result]]:
    """Yield (item number, function(item)) for every item, each from a Ray task, in the order of completion.

    At most `in_flight` items (default: `resources.tasks`) are submitted at a time; `items` is read as tasks
    complete. An item whose worker dies is tried again up to `resources.max_retries` times, then WorkerLost is
    raised. An exception of `function` is raised as it is, with a note that names the item. `check` is called
    at least once per second and may raise. A worker whose code is not the driver's does nothing, and
    UserError is raised. When the iteration ends early, the running tasks are killed.
    """
    if in_flight is not None and in_flight < 1:
        raise ValueError(f"in_flight={in_flight} is less than 1")
    workers = TaskWorkers(function, site, in_flight or site.resources.tasks)
    yield from _results(workers, items, _function_name(function), site.resources.max_retries, check)


def actor_pool(
    actor_factory: Callable[..., object],
    factory_args: Sequence[Any],
    items: Iterable[Any],
    method: str,
    *,
    site: Site,
    check: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield (item number, actor_factory(*factory_args).method(item)) in the order of completion.

    `resources.actors` Ray actors build one object each and work on one item at a time. A dead actor is
    replaced and its item tried again, up to `resources.max_retries` times. Failures, `check` and an early end
    are handled as in `map_tasks`.
    """
    workers: ActorWorkers[Any] = ActorWorkers(actor_factory, tuple(factory_args), method, site)
    name = f"{_function_name(actor_factory)}.{method}"
    yield from _results(workers, items, name, site.resources.max_retries, check)


def _results(
    workers: Workers[Item],
    items: Iterable[Item],
    name: str,
    max_retries: int,
    check: Callable[[], None] | None,
) -> Iterator[tuple[int, Any]]:
    """Yield (item number, result) for every item; `name` is what messages call the function."""
    running: dict[ray.ObjectRef[Any], Submitted[Item]] = {}
    pending = enumerate(items)
    try:
        while True:
            while workers.has_room(len(running)):
                try:
                    number, item = next(pending)
                except StopIteration:
                    workers.no_more_items()
                    break
                running[workers.submit(item)] = Submitted(number, item)
            if not running:
                return
            for reference in _ready(list(running), check):
                submitted = running.pop(reference)
                try:
                    report, result = ray.get(reference)
                except WORKER_LOST as error:
                    workers.died(reference)
                    allow_retry(error, submitted, name, max_retries)
                    again = replace(submitted, num_deaths=submitted.num_deaths + 1)
                    running[workers.submit(submitted.item)] = again
                    continue
                except RayTaskError as error:
                    raise_cause(error, submitted, name)
                accept(report)
                workers.succeeded(reference)
                yield submitted.number, result
    finally:
        workers.stop(list(running))


def _ready(
    references: list[ray.ObjectRef[Any]], check: Callable[[], None] | None
) -> list[ray.ObjectRef[Any]]:
    """Wait until a result is ready and return its reference; call `check` while waiting."""
    while True:
        if check is not None:
            check()
        # A lost result counts as ready. fetch_local would copy results before the caller asks for them.
        ready, _ = ray.wait(references, num_returns=1, timeout=CHECK_EVERY_S, fetch_local=False)
        if ready:
            return ready


def allow_retry(error: Exception, submitted: Submitted[Any], name: str, max_retries: int) -> None:
    """Log that a worker died on an item; raise WorkerLost when the item has no retry left."""
    reason = one_line(error, max_chars=None)
    if submitted.num_deaths >= max_retries:
        raise WorkerLost(
            f"item {submitted.number} of {name} ({_short(submitted.item)}): its worker died "
            f"{submitted.num_deaths + 1} times (resources.max_retries={max_retries}); the last time: {reason}"
        ) from error
    logger.warning("item %d of %s: its worker died, trying again: %s", submitted.number, name, reason)


def raise_cause(error: RayTaskError, submitted: Submitted[Any], name: str) -> NoReturn:
    """Raise the exception of the function itself, from the RayTaskError that has the worker's traceback."""
    cause = error.cause if isinstance(error.cause, Exception) else error
    cause.add_note(f"in item {submitted.number} of {name}: {_short(submitted.item)}")
    if cause is error:
        raise error
    raise cause from error


def _function_name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def _short(item: object) -> str:
    text = repr(item)
    return text if len(text) <= 200 else text[:200] + "..."
