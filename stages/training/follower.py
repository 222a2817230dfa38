"""What the driver does beside a training that runs: it tells how far it is, and asks whether it must stop."""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from stages.context import Context
from stages.stops import Interrupted
from stages.training.faults import KL_RISE, write_notice
from stages.training.metrics import NewSteps

logger = logging.getLogger(__name__)
_FOLLOW_S = 1.0


class Follower:
    """Beside a training: tells the context how far it is, and asks it whether the training must stop."""

    def __init__(self, context: Context, num_steps: int):
        self._context, self._num_steps = context, num_steps
        self._steps: NewSteps | None = None
        self._collapses, self._next_spike = False, 0
        self._reported = -1
        self._ended = threading.Event()
        self._stop: BaseException | None = None
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def raise_what_stopped(self) -> None:
        """What the context's check raised, if it has."""
        if self._stop is not None:
            raise self._stop

    def _follow(self) -> None:
        while not self._ended.wait(_FOLLOW_S):
            with self._going_on():
                self._tell_progress()
            try:
                if self._stop is None:
                    self._context.check()
            except (Exception, Interrupted) as stop:
                logger.warning("the training has to stop: %s", stop)
                self._stop = stop
            if self._stop is not None:  # again and again: ranks that just begin do not listen yet
                for rank in range(self._context.site.resources.workers):
                    text = f"driver: {type(self._stop).__name__}\n"
                    with self._going_on():
                        write_notice(self._context.parts.attempt_folder, rank, text)

    def _tell_progress(self) -> None:
        if self._steps is None:
            self._steps = NewSteps(self._context.parts)
        for step, metrics in self._steps.read():
            self._warn(step, metrics)
        if (now := self._steps.last) != self._reported:
            self._context.progress(now, self._num_steps, "steps")
            self._reported = now

    def _warn(self, step: int, metrics: Mapping[str, float]) -> None:
        """Says what goes wrong in the numbers without ending the training: a collapse once until it is over,
        spikes of the loss at the first, second, fourth, ... one."""
        over = metrics.get("validation_kl_over_best")
        if over is not None:
            if over > KL_RISE and not self._collapses:
                self._context.note(
                    f"step {step}: the validation KL is {over:.2f} times its best; a lower "
                    "optimizer.learning_rate keeps it down, select: best publishes the best policy"
                )
            self._collapses = over > KL_RISE
        spikes = int(metrics.get("loss_spikes", 0))
        if not self._next_spike:  # those of earlier attempts were said then
            self._next_spike = spikes + 1
        if spikes >= self._next_spike:
            self._context.note(
                f"step {step}: spike {spikes} of the loss ({metrics['loss']:.4g}); look at the samples of "
                "the step (vico audit RUN --step); train.max_loss_spikes ends a training that has too many"
            )
            self._next_spike = 2 * spikes

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """A shared folder that fails for a moment, or a full one, must not end the watch; each fault is said
        once."""
        try:
            yield
        except Exception as error:
            if repr(error) not in self._said:
                logger.warning("beside the training: %s; tried again", error)
            self._said.add(repr(error))
