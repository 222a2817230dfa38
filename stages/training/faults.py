"""What can befall a rank between two steps: a notice to stop, a hang, a loss that is no number, spikes,
skipped updates.
"""

import faulthandler
import math
import os
import signal
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.site import TrainSettings

NOTICE_FILE = "stop-notice-{rank}.txt"
STACKS_FILE = "stacks-{rank}.txt"
KL_RISE = 1.5
"""A validation KL so many times its best is the early sign of a collapse."""
_WINDOW = 50  # losses whose median a spike is measured against
_LEAST_SEEN = 10


class Preempted(Exception):
    """A rank got notice that it will be ended; the step was done and its checkpoint published on every
    rank."""


class Diverged(RuntimeError):
    """The training has gone wrong in its numbers; nothing after the last checkpoint is kept."""


class StopNotice:
    """SIGTERM to this process, such as a node sends that is taken away, or what `write_notice` was told.

    Python's own handlers run in the main thread only and Ray Train runs us in another. The handler of
    `faulthandler` is plain C: it writes the stacks to a file, and a file that is not empty is the notice.
    """

    def __init__(self, folder: Path, rank: int):
        self._file = (folder / NOTICE_FILE.format(rank=rank)).open("w")
        faulthandler.register(signal.SIGTERM, file=self._file, all_threads=True, chain=False)

    def given(self) -> bool:
        return os.fstat(self._file.fileno()).st_size > 0

    def close(self) -> None:
        faulthandler.unregister(signal.SIGTERM)
        self._file.close()


_listening: StopNotice | None = None


@contextmanager
def stop_notice(folder: Path, rank: int) -> Iterator[StopNotice]:
    """The notice of this process: the loop of a training takes the one that its rank has listened with since
    it began, models being loaded and weights written before and after the loop."""
    global _listening
    if _listening is not None:
        yield _listening
        return
    _listening = StopNotice(folder, rank)
    try:
        yield _listening
    finally:
        _listening.close()
        _listening = None


def noticed_ranks(folder: Path) -> list[int]:
    """The ranks of this start that have had notice so far."""
    # read, for a file server may answer for a size from memory
    files = (path for path in folder.glob(NOTICE_FILE.format(rank="*")) if path.read_bytes())
    return sorted(int(path.stem.rpartition("-")[2]) for path in files)


def remove_notices(folder: Path) -> None:
    """Removes the notices of an earlier start."""
    for path in folder.glob(NOTICE_FILE.format(rank="*")):
        path.unlink()


def write_notice(folder: Path, rank: int, text: str) -> None:
    """Gives a rank notice from outside of its training; of no effect before the training listens."""
    with (folder / NOTICE_FILE.format(rank=rank)).open("a") as file:
        file.write(text)


class Watchdog:
    """Ends this process when no step ends within `timeout_s`, and leaves its last step and its stacks.

    The timer is a thread of `faulthandler` in C: it fires even where a library holds Python's lock. The
    ranks that wait for a hung one end in the same way, so their files together say which one hung where.
    """

    def __init__(self, folder: Path, rank: int, timeout_s: float):
        self._file = (folder / STACKS_FILE.format(rank=rank)).open("w")
        self._rank, self._timeout_s = rank, timeout_s

    def step_done(self, step: int) -> None:
        """Starts the time anew; `step` updates are done."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(
            f"rank {self._rank}: last step {step}, no further one within {self._timeout_s:g} s\n"
        )
        self._file.flush()
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=self._file)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        Path(self._file.name).unlink()
        self._file.close()


def hung_ranks(folder: Path, start: str) -> list[str]:
    """What watchdogs left in an attempt's folder: a line a rank whose time ran out. Its file is kept as
    `hung-<start>-<rank>.txt`: the next start has stacks of its own."""
    lines = []
    for path in sorted(folder.glob(STACKS_FILE.format(rank="*"))):
        first, _, stacks = path.read_text(encoding="utf-8").partition("\n")
        if stacks.strip():
            kept = path.with_name(path.name.replace("stacks-", f"hung-{start}-"))
            lines.append(f"{first} (stacks in {path.rename(kept)})")
    return lines


def remove_stacks(folder: Path) -> None:
    """Removes what watchdogs of a start left whose time did not run out."""
    for path in folder.glob(STACKS_FILE.format(rank="*")):
        path.unlink()


class LossWatch:
    """Counts spikes of the loss and updates that were skipped; raises Diverged past the site's budgets.

    A spike is a loss over `loss_spike_factor` times the median of the last 50. `state` is what a checkpoint
    keeps of it and `since` what it is made of again: budgets are of the whole training, however often it was
    started. `skipped_before` is the engine's own count at the start.
    """

    def __init__(
        self, settings: TrainSettings, since: Mapping[str, Any] | None = None, skipped_before: int = 0
    ):
        since = since or {"losses": [], "num_spikes": 0, "num_skipped": 0}
        self._settings = settings
        self._losses: deque[float] = deque(since["losses"], maxlen=_WINDOW)
        self._num_spikes, self._num_skipped = since["num_spikes"], since["num_skipped"]
        self._not_counted = skipped_before - self._num_skipped

    @property
    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "losses": list(self._losses),
            "num_spikes": self._num_spikes,
            "num_skipped": self._num_skipped,
        }

    def counts(self, step: int, loss: float, grad_norm: float, engine_skipped: int) -> dict[str, float]:
        """Metrics of the step that has just ended, `engine_skipped` being the engine's count; call on every
        rank with the same numbers."""
        settings, num_skipped = self._settings, engine_skipped - self._not_counted
        # DeepSpeed leaves such an update out, in every dtype and without a word: weights would never move.
        is_allowed = settings.max_skipped_steps is not None and num_skipped > self._num_skipped
        if not math.isfinite(grad_norm) and not is_allowed:
            raise Diverged(
                f"step {step}: the gradient's norm is {grad_norm} (loss {loss:.6g}); lower "
                "optimizer.learning_rate, look at the samples of the step (vico audit RUN --step), or let "
                "some such updates be left out with train.max_skipped_steps in the site"
            )
        self._num_skipped = num_skipped
        seen = len(self._losses) >= _LEAST_SEEN
        if seen and loss > settings.loss_spike_factor * statistics.median(self._losses):
            self._num_spikes += 1
        self._losses.append(loss)
        for name, count, most in (
            ("max_loss_spikes", self._num_spikes, settings.max_loss_spikes),
            ("max_skipped_steps", num_skipped, settings.max_skipped_steps),
        ):
            if most is not None and count > most:
                raise Diverged(
                    f"step {step}: train.{name}={most} is passed ({count}); lower optimizer.learning_rate, "
                    f"or raise train.{name} in the site"
                )
        return {"loss_spikes": float(self._num_spikes), "skipped_steps": float(num_skipped)}
