"""Checkpoints of a training: written in the background, published when every rank's files are there, and
proved on resume by the loss of a pack that was noted when they were written.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from stages.parts import Parts

if TYPE_CHECKING:
    from stages.engine import Engine

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
FACTS_FILE = "facts.json"
"""Beside the files of the ranks: what can be asked of a checkpoint before it is loaded."""
STATE = "state"
"""The folder of the ranks' files within a checkpoint."""
_PROBE_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


class CheckpointDiffers(RuntimeError):
    """A loaded checkpoint does not give the loss that was noted when it was written."""


def checkpoints(parts: Parts) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, oldest first."""
    return sorted(
        (int(path.name.removeprefix("step-")), path) for path in parts.output.glob(f"{CHECKPOINTS}/step-*")
    )


def universal_folder(parts: Parts, step: int) -> Path:
    """Where the attempt keeps the checkpoint of `step` in the form that any number of ranks loads."""
    return parts.attempt_folder / "universal" / f"step-{step:07d}"


def remove_checkpoints(parts: Parts) -> None:
    """Drops what only a resume needs, once the stage's result is published."""
    for name in (CHECKPOINTS, "best"):
        parts.remove(name)
    for attempt in (parts.folder / "attempts").glob("*/universal"):
        shutil.rmtree(attempt, ignore_errors=True)


class Checkpoints:
    """One rank's part in writing and loading. Every rank must make the same calls in the same order.

    `probe(step)` gives the loss, without randomness, of one pack that every rank can read: the same number
    before a checkpoint and after it is loaded.
    """

    def __init__(self, engine: "Engine", parts: Parts, keep: int, probe: Callable[[int], float]):
        self._engine, self._parts, self._keep, self._probe = engine, parts, keep, probe
        self._pending: tuple[int, Path, dict] | None = None
        self.seconds_stopped = 0.0
        """How long training stood still for the last checkpoint."""

    def restore(self) -> tuple[int, dict[str, float]]:
        """(updates done by the last complete checkpoint, the loss before and after as metrics); 0 without
        one.

        A checkpoint of other ranks is taken from its universal form, which the driver has made. Raises
        CheckpointDiffers when the loss is not that of the checkpoint.
        """
        found = checkpoints(self._parts)
        if not found:
            return 0, {}
        step, folder = found[-1]
        facts = json.loads((folder / FACTS_FILE).read_text())
        own = facts["world_size"] == self._engine.world_size
        source = folder if own else universal_folder(self._parts, step)
        self._engine.load_checkpoint(source, STATE, universal=not own)
        before, after = facts["probe_loss"], self._probe(step)
        difference = abs(after - before) / max(abs(before), 1e-12)
        logger.info("goes on from step %d (%s): loss %.9g before, %.9g after", step, source, before, after)
        tolerance = _PROBE_TOLERANCE[facts["dtype"]]
        if not math.isclose(before, after, rel_tol=tolerance, abs_tol=1e-9):
            raise CheckpointDiffers(
                f"{source} gives a loss of {after:.9g} on a pack that had {before:.9g} when it was written "
                f"(at most {tolerance} relative is rounding); remove {folder} to go on from the one "
                "before; an object store gives it back, so with one begin the stage afresh by --force"
            )
        return step, {
            "resume_loss_before": before,
            "resume_loss_after": after,
            "resume_loss_change": difference,
        }

    def begin(self, step: int) -> None:
        """Starts the checkpoint of `step`; returns when its state is copied to host memory."""
        name = f"{CHECKPOINTS}/step-{step:07d}"
        self.finish()
        if self._parts.done(name):
            return
        started = time.monotonic()
        facts = {
            "step": step,
            "fingerprint": self._parts.folder.name,
            "world_size": self._engine.world_size,
            "zero_stage": self._engine.settings.zero_stage,
            "offload": self._engine.settings.offload,
            "dtype": str(self._engine.settings.dtype).removeprefix("torch."),
            "probe_loss": self._probe(step),
        }
        folder = self._parts.partial(name)
        if self._engine.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # half written by an earlier try of this attempt
        self._engine.barrier()
        self._engine.write_checkpoint(folder, STATE)
        self._pending = step, folder, facts
        self.seconds_stopped = time.monotonic() - started

    def written(self) -> bool:
        """Whether this rank has nothing left to write; raises what the writing raised."""
        return self._engine.checkpoint_written()

    def publish_if(self, all_written: bool) -> None:
        """Publishes the pending checkpoint where all ranks said that theirs is written; drops old ones."""
        if self._pending is None or not all_written:
            return
        (step, folder, facts), self._pending = self._pending, None
        if self._engine.rank == 0:
            (folder / FACTS_FILE).write_text(json.dumps(facts))
            self._parts.publish(f"{CHECKPOINTS}/step-{step:07d}")
            for _, old in checkpoints(self._parts)[: -self._keep]:
                self._parts.remove(f"{CHECKPOINTS}/{old.name}")

    def finish(self) -> None:
        """Waits for the pending checkpoint, if there is one, and publishes it."""
        if self._pending is not None:
            self._engine.wait_for_checkpoint()
            self._engine.barrier()
            self.publish_if(True)
        self._engine.barrier()
