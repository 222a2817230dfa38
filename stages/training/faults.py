"""What can happen to a rank between two steps: a notice to stop, a hang, a non-finite gradient, loss spikes,
skipped updates.
"""

import faulthandler
import math
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from cluster.train_settings import DivergenceSettings
from vico.own_files import no_links

NOTICE_FILE = "stop-notice-{rank}.txt"
STACKS_FILE = "stacks-{rank}.txt"
KL_RISE = 1.5
"""A validation KL above this factor times its best is an early sign of a collapse."""
_WINDOW = 50  # losses in the median that a spike is compared with
_MIN_LOSSES = 10


class Preempted(Exception):
    """A rank got notice that it will be ended. It has finished its step and published the checkpoint or,
    before the first step, has finished the file of a shard."""


class Diverged(RuntimeError):
    """The numbers of the training have gone wrong; nothing after the last checkpoint is kept."""


class StopNotice:
    """A notice to stop: SIGTERM to this process, as from a node that is taken away, or a `write_notice`.

    Python runs signal handlers only in the main thread, and Ray Train runs us in another. The handler of
    `faulthandler` is plain C: it writes the stacks to a file, and a file that is not empty is the notice.
    """

    def __init__(self, folder: Path, rank: int):
        self._file = open(folder / NOTICE_FILE.format(rank=rank), "w", opener=no_links)  # noqa: SIM115
        faulthandler.register(signal.SIGTERM, file=self._file, all_threads=True, chain=False)

    def given(self) -> bool:
        """Return whether there is a notice."""
        return os.fstat(self._file.fileno()).st_size > 0

    def close(self) -> None:
        faulthandler.unregister(signal.SIGTERM)
        self._file.close()


_listening: StopNotice | None = None


@contextmanager
def stop_notice(folder: Path, rank: int) -> Iterator[StopNotice]:
    """Open the notice of this process, or return the one that is open already.

    A rank opens it before it loads its models and closes it after it has written the weights; the training
    loop in between uses the same one.
    """
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
    """Return the ranks of this start that have had notice so far."""
    # Read the files: a file server may answer from a cache when asked for a size.
    files = (path for path in folder.glob(NOTICE_FILE.format(rank="*")) if path.read_bytes())
    return sorted(int(path.stem.rpartition("-")[2]) for path in files)


def remove_notices(folder: Path) -> None:
    """Remove the notices of an earlier start."""
    for path in folder.glob(NOTICE_FILE.format(rank="*")):
        path.unlink()


def write_notice(folder: Path, rank: int, text: str) -> None:
    """Give notice to a rank from outside its process. It has no effect before the rank has opened its own."""
    with open(folder / NOTICE_FILE.format(rank=rank), "a", opener=no_links) as file:
        file.write(text)


# Waits until the pipe of its standard input closes, which the kernel does when the rank ends however it ends,
# and then copies the local file ($1) if stacks were written below its first line.
_COPY = """cat > /dev/null
if [ "$(wc -l < "$1")" -gt 1 ]; then cp "$1" "$2.partial" && mv "$2.partial" "$2"; fi
rm -f "$1"
"""
_COPY_S = 1.0
"""How long the copy of a rank's stacks may take after the rank ended."""
_OTHERS_S = 0.3


class Watchdog:
    """Ends this process when no step is finished within `timeout_s`, and leaves its last step and stack
    traces in `folder`.

    The timer is a C thread of `faulthandler`: it fires even while a library holds Python's lock. The ranks
    that wait for the hung one end in the same way, so their files together show which rank hung where. Every
    step writes to a file on this node's own disk alone; a small process beside the rank copies it into
    `folder`, which may be on a file server, when the rank was ended.
    """

    def __init__(self, folder: Path, rank: int, timeout_s: float):
        handle, local = tempfile.mkstemp(prefix=f"vico-stacks-{rank}-", suffix=".txt")
        self._file = open(handle, "w", encoding="utf-8")  # noqa: SIM115
        self._rank, self._timeout_s = rank, timeout_s
        target = folder / STACKS_FILE.format(rank=rank)
        target.unlink(missing_ok=True)
        self._copier = subprocess.Popen(
            ["/bin/sh", "-c", _COPY, "sh", local, str(target)], stdin=subprocess.PIPE, start_new_session=True
        )

    def step_done(self, step: int) -> None:
        """Restart the timer after `step` updates."""
        self._begin(f"rank {self._rank}: last step {step}, no further one within {self._timeout_s:g} s\n")
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=self._file)

    def _begin(self, line: str) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        """Stop the timer and remove the file."""
        faulthandler.cancel_dump_traceback_later()
        self._begin("")
        assert self._copier.stdin is not None
        self._copier.stdin.close()
        self._copier.wait()
        self._file.close()


def hung_ranks(folder: Path, start: str, wait_s: float = _COPY_S) -> list[str]:
    """Return one line per rank whose watchdog ended it, from the files in an attempt's folder.

    Each file is kept as `hung-<start>-<rank>.txt`, because the next start writes its own. If there is none
    yet, waits up to `wait_s` for the copies from the nodes of the ranks.
    """
    ends_s = time.monotonic() + wait_s
    pattern = STACKS_FILE.format(rank="*")
    while not list(folder.glob(pattern)) and time.monotonic() < ends_s:
        time.sleep(0.1)
    time.sleep(min(wait_s, _OTHERS_S))  # the ranks of a hang end within moments of each other
    lines = []
    for path in sorted(folder.glob(pattern)):
        last_step, _, stacks = path.read_text(encoding="utf-8").partition("\n")
        if stacks.strip():
            kept = path.with_name(path.name.replace("stacks-", f"hung-{start}-"))
            lines.append(f"{last_step} (stacks in {path.rename(kept)})")
    return lines


def remove_stacks(folder: Path) -> None:
    """Remove the files of watchdogs that did not end their rank."""
    for path in folder.glob(STACKS_FILE.format(rank="*")):
        path.unlink()


class LossWatchState(TypedDict):
    """What a checkpoint keeps of a LossWatch."""

    losses: list[float]
    num_spikes: int
    num_skipped: int


class LossWatch:
    """Counts loss spikes and skipped updates; raises Diverged when there are more than the site allows.

    A spike is a loss above `loss_spike_factor` times the median of the last 50. The limits apply to the whole
    training, however often it was started: a checkpoint keeps `state`, and a resume passes it as
    `resume_from`. `skipped_before` is the engine's own count at the start.
    """

    def __init__(
        self,
        settings: DivergenceSettings,
        resume_from: LossWatchState | None = None,
        skipped_before: int = 0,
    ):
        state = resume_from or LossWatchState(losses=[], num_spikes=0, num_skipped=0)
        self._settings = settings
        self._losses: deque[float] = deque(state["losses"], maxlen=_WINDOW)
        self._num_spikes, self._num_skipped = state["num_spikes"], state["num_skipped"]
        self._not_counted = skipped_before - self._num_skipped

    @property
    def state(self) -> LossWatchState:
        """Return what a checkpoint keeps; it fits into JSON."""
        return {
            "losses": list(self._losses),
            "num_spikes": self._num_spikes,
            "num_skipped": self._num_skipped,
        }

    def counts(self, step: int, loss: float, grad_norm: float, engine_skipped: int) -> dict[str, float]:
        """Return the fault metrics of the step that has just ended; raise Diverged if there were too many.

        `engine_skipped` is the engine's own count of skipped updates. Every rank calls it with the same
        numbers.
        """
        settings, num_skipped = self._settings, engine_skipped - self._not_counted
        # DeepSpeed silently skips an update with such a gradient, in every dtype: the weights would never
        # move.
        is_allowed = settings.max_skipped_steps is not None and num_skipped > self._num_skipped
        if not math.isfinite(grad_norm) and not is_allowed:
            raise Diverged(
                f"step {step}: the gradient's norm is {grad_norm} (loss {loss:.6g}); lower "
                "optimizer.learning_rate, look at the samples of the step (vico audit RUN --step), or allow "
                "some such updates to be skipped with train.divergence.max_skipped_steps in the site"
            )
        self._num_skipped = num_skipped
        if len(self._losses) >= _MIN_LOSSES:
            self._num_spikes += loss > settings.loss_spike_factor * statistics.median(self._losses)
        self._losses.append(loss)
        for name, count, limit in (
            ("max_loss_spikes", self._num_spikes, settings.max_loss_spikes),
            ("max_skipped_steps", num_skipped, settings.max_skipped_steps),
        ):
            if limit is not None and count > limit:
                raise Diverged(
                    f"step {step}: train.divergence.{name}={limit} is passed ({count}); lower "
                    f"optimizer.learning_rate, or raise train.divergence.{name} in the site"
                )
        return {"loss_spikes": float(self._num_spikes), "skipped_steps": float(num_skipped)}
