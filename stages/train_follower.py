"""What the driver does beside a training that runs: it tells how far it is, and asks whether it must stop."""

import logging
import threading

from stages.context import Context, Interrupted
from stages.train_faults import write_notice
from stages.training_metrics import StepsDone

logger = logging.getLogger(__name__)

_FOLLOW_S = 1.0


class Follower:
    """Beside a training: tells the context how far it is, and asks it whether the training must stop."""

    def __init__(self, context: Context, num_steps: int):
        self._context, self._num_steps = context, num_steps
        self._ended = threading.Event()
        self._stop: BaseException | None = None
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
        done, reported = StepsDone(self._context.parts), -1
        while not self._ended.wait(_FOLLOW_S):
            if (now := done.last()) != reported:
                self._context.progress(now, self._num_steps, "steps")
                reported = now
            try:
                if self._stop is None:
                    self._context.check()
            except (Exception, Interrupted) as stop:
                logger.warning("the training has to stop: %s", stop)
                self._stop = stop
            if self._stop is not None:  # again and again: ranks that just begin do not listen yet
                for rank in range(self._context.site.resources.workers):
                    text = f"driver: {type(self._stop).__name__}\n"
                    write_notice(self._context.parts.attempt_folder, rank, text)
