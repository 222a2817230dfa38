"""The packs of a training by one number, the step, counted from 0 over all epochs."""

import math
from collections.abc import Callable

from data_prep.packs.pack import Pack
from data_prep.packs.plan import PackPlan


class EpochPlans:
    """The plans of all epochs, each made by `new_plan(epoch)` when it is first needed."""

    def __init__(self, new_plan: Callable[[int], PackPlan], epochs: float, max_steps: int):
        self._new_plan = new_plan
        self._plans: dict[int, PackPlan] = {}
        self.num_steps = num_training_steps(epochs, max_steps, lambda epoch: self._plan(epoch).num_steps)

    def packs(self, step: int) -> list[Pack]:
        """Return the packs of a step. Epochs may differ in their number of steps, by fractional repeats."""
        epoch = 0
        while step >= self._plan(epoch).num_steps:
            step -= self._plan(epoch).num_steps
            epoch += 1
        return self._plan(epoch).step(step)

    def num_steps_of(self, epoch: int) -> int:
        """Return the number of steps of an epoch that is not cut short."""
        return self._plan(epoch).num_steps

    def _plan(self, epoch: int) -> PackPlan:
        if epoch not in self._plans:
            self._plans[epoch] = self._new_plan(epoch)
        return self._plans[epoch]


def num_training_steps(epochs: float, max_steps: int, steps_of_epoch: Callable[[int], int]) -> int:
    """Return the number of updates of a training: `epochs` of the data, at most `max_steps` if that is not 0.

    Each epoch is asked for its own number of steps, up to the limit.
    """
    steps = 0
    for epoch in range(math.ceil(epochs)):
        steps += math.ceil(min(1.0, epochs - epoch) * steps_of_epoch(epoch))
        if max_steps and steps >= max_steps:
            return max_steps
    return steps
