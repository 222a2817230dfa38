"""What the driver does while a training runs: report its progress, and ask whether it must stop."""

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from stages.context import Context
from stages.stops import Interrupted
from stages.training.faults import KL_RISE, write_notice
from stages.training.metrics import NewSteps
from stages.training.ranks.phases import read_phase

logger = logging.getLogger(__name__)
_FOLLOW_S = 1.0
_RECENT_STEPS = 20
"""Steps whose mean loss and speed are shown: those of one step jump."""


def recent_figures(steps: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return what is shown of the latest steps: mean loss and speed, and the last learning rate.

    A postponed validation has a line without them.
    """
    values = {
        name: [metrics[name] for metrics in steps if name in metrics]
        for name in ("loss", "learning_rate", "tokens_per_second", "tiles_per_second")
    }
    if values["tokens_per_second"]:
        del values["tiles_per_second"]  # only the router, which reads no tokens, is counted in tiles
    return {
        name: series[-1] if name == "learning_rate" else sum(series) / len(series)
        for name, series in values.items()
        if series
    }


class Follower:
    """A thread beside a training: tells the context its progress, and asks the context whether to stop."""

    def __init__(self, context: Context, num_steps: int):
        self._context, self._num_steps = context, num_steps
        self._steps: NewSteps | None = None
        self._collapse_noted, self._next_spike = False, 0
        self._reported_step = -1
        self._recent: deque[Mapping[str, float]] = deque(maxlen=_RECENT_STEPS)
        self._ended = threading.Event()
        self._stop: BaseException | None = None
        self._logged_faults: set[str] = set()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def raise_what_stopped(self) -> None:
        """Raise what the context's check raised, if it did."""
        if self._stop is not None:
            raise self._stop

    def _follow(self) -> None:
        while not self._ended.wait(_FOLLOW_S):
            with self._logged_once():
                self._report_progress()
            try:
                if self._stop is None:
                    self._context.check()
            except (Exception, Interrupted) as stop:
                logger.info("the training has to stop: %s", stop)
                self._stop = stop
            if self._stop is not None:  # in every round: ranks that have just started do not listen yet
                self._notify_ranks(type(self._stop).__name__)

    def _notify_ranks(self, reason: str) -> None:
        for rank in range(self._context.site.resources.workers):
            with self._logged_once():
                write_notice(self._context.parts.attempt_folder, rank, f"driver: {reason}\n")

    def _report_progress(self) -> None:
        if self._steps is None:
            self._steps = NewSteps(self._context.parts)
        for step, metrics in self._steps.read():
            self._note_collapse(step, metrics)
            self._note_spikes(step, metrics)
            self._recent.append(metrics)
        phase = read_phase(self._context.parts.attempt_folder)
        if phase is not None:
            self._context.progress(*phase)
            self._reported_step = -1  # the steps are shown again when the phase has ended
        elif self._steps.last != self._reported_step:
            self._context.progress(self._steps.last, self._num_steps, "steps", recent_figures(self._recent))
            self._reported_step = self._steps.last

    def _note_collapse(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note a rise of the validation KL, once until it is over."""
        over_best = metrics.get("validation_kl_over_best")
        if over_best is None:
            return
        if over_best > KL_RISE and not self._collapse_noted:
            self._context.note(
                f"step {step}: the validation KL is {over_best:.2f} times its best; a lower "
                "optimizer.learning_rate keeps it down, select: best publishes the best policy"
            )
        self._collapse_noted = over_best > KL_RISE

    def _note_spikes(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the first, second, fourth, ... spike of the loss."""
        spikes = int(metrics.get("loss_spikes", 0))
        if not self._next_spike:  # earlier attempts have noted theirs
            self._next_spike = spikes + 1
        if spikes >= self._next_spike:
            self._context.note(
                f"step {step}: spike {spikes} of the loss ({metrics['loss']:.4g}); look at the samples of "
                "the step (vico audit RUN --step); train.divergence.max_loss_spikes ends a training that has "
                "too many"
            )
            self._next_spike = 2 * spikes

    @contextmanager
    def _logged_once(self) -> Iterator[None]:
        """Log an error instead of raising it, each only once: the thread must survive a shared folder that
        fails for a moment, or a full one."""
        try:
            yield
        except Exception as error:
            if repr(error) not in self._logged_faults:
                logger.warning("beside the training: %s; trying again", error)
            self._logged_faults.add(repr(error))
