"""Mapping a function, or a pool of models, over items on Ray: bounded, as results come, nothing lost.

Stages call it inside a `ray_session`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

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

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")
WORKER_LOST = (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)
CHECK_EVERY_S = 1.0
NO_MORE = (None, None)


class WorkerLost(RuntimeError):
    """The process that worked on an item died more often than `resources.max_retries` allows."""


def map_tasks(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    site: Site,
    in_flight: int | None = None,
    check: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Result]]:
    """(item number, function(item)) of every item, each in a Ray task, in the order in which they end.

    At most `in_flight` items (default: `resources.tasks`) are with Ray at a time; `items` is read as
    places become free. An item whose worker dies is tried again up to `resources.max_retries` times,
    then WorkerLost is raised. An exception of `function` is raised as it is, with a note that names the
    item. `check` is called at least once a second and may raise. When the iteration ends early, the tasks
    that still run are killed.
    """
    if in_flight is not None and in_flight < 1:
        raise ValueError(f"in_flight={in_flight} is less than 1")
    # Deaths are counted here and not by Ray, so that each one is logged with its item.
    task = ray.remote(num_cpus=site.resources.threads_per_worker, max_retries=0)(call)
    shipped = ray.put(function)
    running: dict[ray.ObjectRef, tuple[int, Item, int]] = {}  # -> item number, item, deaths so far
    pending = enumerate(items)
    try:
        while True:
            while len(running) < (in_flight or site.resources.tasks):
                number, item = next(pending, NO_MORE)
                if number is None:
                    break
                running[task.remote(shipped, item)] = (number, item, 0)
            if not running:
                return
            for reference in ended(list(running), check):
                number, item, deaths = running.pop(reference)
                try:
                    result = ray.get(reference)
                except WORKER_LOST as error:
                    allow_retry(error, number, item, deaths, site, named(function))
                    running[task.remote(shipped, item)] = (number, item, deaths + 1)
                    continue
                except RayTaskError as error:
                    raise_cause(error, number, item, named(function))
                yield number, result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def actor_pool(
    actor_factory: Callable[..., Any],
    factory_args: Sequence[Any],
    items: Iterable[Item],
    method: str,
    *,
    site: Site,
    check: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """(item number, actor_factory(*factory_args).method(item)) of every item, in the order in which they end.

    `resources.actors` Ray actors build one object each and work on one item at a time. A dead actor is
    replaced and its item tried again, up to `resources.max_retries` times; failures, `check` and the end
    are as in `map_tasks`.
    """
    name = f"{named(actor_factory)}.{method}"
    pool = ActorPool(actor_factory, tuple(factory_args), site)
    running: dict[ray.ObjectRef, tuple[int, Item, int, Any]] = {}  # as in map_tasks, and the actor
    pending = enumerate(items)
    try:
        while True:
            while pool.has_room():
                number, item = next(pending, NO_MORE)
                if number is None:
                    pool.stop_idle()
                    break
                actor = pool.take()
                running[actor.call.remote(method, item)] = (number, item, 0, actor)
            if not running:
                return
            for reference in ended(list(running), check):
                number, item, deaths, actor = running.pop(reference)
                try:
                    result = ray.get(reference)
                except WORKER_LOST as error:
                    pool.stop(actor)
                    allow_retry(error, number, item, deaths, site, name)
                    actor = pool.take()
                    running[actor.call.remote(method, item)] = (number, item, deaths + 1, actor)
                    continue
                except RayTaskError as error:
                    raise_cause(error, number, item, name)
                pool.idle.append(actor)
                yield number, result
    finally:
        for actor in list(pool.actors):
            pool.stop(actor)


class ActorPool:
    """The actors of one `actor_pool` call, started as they are needed, at most `resources.actors`."""

    def __init__(self, factory: Callable[..., Any], factory_args: tuple[Any, ...], site: Site) -> None:
        resources = site.resources
        self.server = ray.remote(
            num_cpus=resources.threads_per_worker, num_gpus=resources.gpus_per_worker, max_restarts=0
        )(Server)
        self.factory, self.factory_args, self.size = factory, factory_args, resources.actors
        self.actors: list[Any] = []
        self.idle: list[Any] = []

    def has_room(self) -> bool:
        return bool(self.idle) or len(self.actors) < self.size

    def take(self) -> Any:
        """An idle actor, or a new one."""
        if self.idle:
            return self.idle.pop()
        self.actors.append(self.server.remote(self.factory, self.factory_args))
        return self.actors[-1]

    def stop(self, actor: Any) -> None:
        self.actors.remove(actor)
        ray.kill(actor)  # also one that Ray calls dead: out of reach, it may still live

    def stop_idle(self) -> None:
        """Free what the pool no longer needs; an actor that waits for a place may need just that."""
        while self.idle:
            self.stop(self.idle.pop())


class Server:
    """The actor. Builds its object in the first call, so that a failure to build is raised like any other."""

    def __init__(self, factory: Callable[..., Any], factory_args: tuple[Any, ...]) -> None:
        self.factory, self.factory_args = factory, factory_args
        self.served: Any = None

    def call(self, method: str, item: Any) -> Any:
        if self.served is None:
            self.served = self.factory(*self.factory_args)
        return getattr(self.served, method)(item)


def call(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)


def ended(references: list[ray.ObjectRef], check: Callable[[], None] | None) -> list[ray.ObjectRef]:
    """The references that are ready, at least one; calls `check` while it waits."""
    while True:
        if check is not None:
            check()
        # A lost one counts as ready. fetch_local would copy results before the caller asks for them.
        ready, _ = ray.wait(references, num_returns=1, timeout=CHECK_EVERY_S, fetch_local=False)
        if ready:
            return ready


def allow_retry(error: Exception, number: int, item: Any, deaths: int, site: Site, name: str) -> None:
    """Log that a worker died on an item, or raise WorkerLost when that happened once too often."""
    reason = " ".join(str(error).split())
    if deaths >= site.resources.max_retries:
        raise WorkerLost(
            f"item {number} of {name} ({short(item)}): its worker died {deaths + 1} times "
            f"(resources.max_retries={site.resources.max_retries}); the last time: {reason}"
        ) from error
    logger.warning("item %d of %s: its worker died, trying again: %s", number, name, reason)


def raise_cause(error: RayTaskError, number: int, item: Any, name: str) -> NoReturn:
    """Raise what the function raised, by its own type, from the RayTaskError with the worker's traceback."""
    cause = error.cause if isinstance(error.cause, Exception) else error
    cause.add_note(f"in item {number} of {name}: {short(item)}")
    if cause is error:
        raise error
    raise cause from error


def named(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def short(item: Any) -> str:
    text = repr(item)
    return text if len(text) <= 200 else text[:200] + "..."
