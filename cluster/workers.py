"""The Ray tasks or actors that `cluster/tasks.py` gives its items to."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Generic, Protocol, TypeVar

import ray

from cluster.process_environment import process_environment
from cluster.site import Site
from cluster.sources import in_worker
from cluster.sources.by_value import pickled
from cluster.sources.driver import driver_code

Item = TypeVar("Item")
ContravariantItem = TypeVar("ContravariantItem", contravariant=True)
Result = TypeVar("Result")


class Workers(Protocol[ContravariantItem]):
    """Processes that work on one item each.

    Every result comes as (report of the process about its code, result).
    """

    def has_room(self, num_running: int) -> bool:
        """Return whether another item may be submitted while `num_running` are at work."""

    def submit(self, item: ContravariantItem) -> ray.ObjectRef[Any]:
        """Give an item to a worker and return the reference of its result."""

    def succeeded(self, reference: ray.ObjectRef[Any]) -> None:
        """Take note that a result has come."""

    def died(self, reference: ray.ObjectRef[Any]) -> None:
        """Take note that the worker of a result has died."""

    def no_more_items(self) -> None:
        """Release what only further items would need."""

    def stop(self, running: Collection[ray.ObjectRef[Any]]) -> None:
        """Kill all workers, those of the `running` results included."""


class TaskWorkers(Generic[Item, Result]):
    """One Ray task per item, at most `limit` at a time."""

    def __init__(self, function: Callable[[Item], Result], site: Site, limit: int) -> None:
        resources = site.resources
        # Deaths are counted by the caller and not by Ray, so that each one is logged with its item.
        self._task: Any = ray.remote(
            num_cpus=resources.threads_per_worker,
            resources=resources.placement,
            runtime_env={"env_vars": process_environment(resources)},
            max_retries=0,
        )(in_worker.call_task)
        self._function = ray.put(pickled(function))
        self._limit = limit

    def has_room(self, num_running: int) -> bool:
        return num_running < self._limit

    def submit(self, item: Item) -> ray.ObjectRef[Any]:
        return self._task.remote(driver_code()["digest"], self._function, pickled(item))

    def succeeded(self, reference: ray.ObjectRef[Any]) -> None:
        pass

    def died(self, reference: ray.ObjectRef[Any]) -> None:
        pass

    def no_more_items(self) -> None:
        pass

    def stop(self, running: Collection[ray.ObjectRef[Any]]) -> None:
        for reference in running:
            ray.cancel(reference, force=True)


class ActorWorkers(Generic[Item]):
    """At most `resources.actors` Ray actors, started when needed, that call `method` of their own object."""

    def __init__(
        self, factory: Callable[..., object], factory_args: tuple[Any, ...], method: str, site: Site
    ) -> None:
        resources = site.resources
        self._actor_class: Any = ray.remote(
            num_cpus=resources.threads_per_worker,
            num_gpus=resources.gpus_per_worker,
            resources=resources.placement,
            runtime_env={"env_vars": process_environment(resources)},
            max_restarts=0,
        )(in_worker.Actor)
        self._factory_and_args, self._method = ray.put(pickled((factory, factory_args))), method
        self._limit = resources.actors
        self._idle: list[Any] = []
        self._busy: dict[ray.ObjectRef[Any], Any] = {}

    def has_room(self, num_running: int) -> bool:
        return bool(self._idle) or len(self._busy) < self._limit

    def submit(self, item: Item) -> ray.ObjectRef[Any]:
        actor = self._idle.pop() if self._idle else self._new_actor()
        reference = actor.call.remote(self._method, pickled(item))
        self._busy[reference] = actor
        return reference

    def _new_actor(self) -> Any:
        return self._actor_class.remote(driver_code()["digest"], self._factory_and_args)

    def succeeded(self, reference: ray.ObjectRef[Any]) -> None:
        self._idle.append(self._busy.pop(reference))

    def died(self, reference: ray.ObjectRef[Any]) -> None:
        ray.kill(self._busy.pop(reference))  # it may be alive even if Ray calls it dead: only out of reach

    def no_more_items(self) -> None:
        """Stop the idle actors: an actor that has not started yet may be waiting for their CPUs and GPUs."""
        while self._idle:
            ray.kill(self._idle.pop())

    def stop(self, running: Collection[ray.ObjectRef[Any]]) -> None:
        for actor in (*self._idle, *self._busy.values()):
            ray.kill(actor)
        self._idle, self._busy = [], {}
