"""Checkpoints of a training: written in the background, published when every rank's files are there, and
proved on resume by the loss of a pack that was noted when they were written.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.durable_files import delete
from stages.parts import Parts

if TYPE_CHECKING:
    from stages.training.engine import Engine


logger = logging.getLogger(__name__)
CHECKPOINTS, BEST = "checkpoints", "best"
FACTS_FILE = "facts.json"
"""Beside the files of the ranks: what can be asked of a checkpoint before it is loaded."""
STATE = "state"
"""The folder of the ranks' files within a checkpoint."""
_PROBE_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
_OTHER_KERNELS_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
"""Where a loss is computed by other kernels than it was, another device or compiled layers: it is a small
difference of two near distributions, in which their rounding shows."""
_LOOK_AGAIN_S = 0.5
_VISIBLE_S = 120.0
"""How long a folder that one node has published may stay unseen on another (NFS: up to a minute)."""


class CheckpointDiffers(RuntimeError):
    """A loaded checkpoint does not give the loss that was noted when it was written."""


def checkpoints(parts: Parts) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, oldest first."""
    return sorted(
        (int(path.name.removeprefix("step-")), path) for path in parts.output.glob(f"{CHECKPOINTS}/step-*")
    )


def best_policies(parts: Parts) -> list[Path]:
    """Folders of the policies that `select: best` keeps, oldest first."""
    return sorted(parts.output.glob(f"{BEST}/step-*"))


def universal_folder(parts: Parts, step: int) -> Path:
    """Where the attempt keeps the checkpoint of `step` in the form that any number of ranks loads."""
    return parts.attempt_folder / "universal" / f"step-{step:07d}"


def wait_until_visible(path: Path) -> None:
    """Waits until this node sees what another has published; RuntimeError when it never does."""
    deadline = time.monotonic() + _VISIBLE_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{path} is there on the node of rank 0 and was not seen here for {_VISIBLE_S:g} s; put "
                "storage (with an object store: work) on a folder that all nodes see"
            )
        os.listdir(path.parent if path.parent.exists() else "/")  # NFS: asks the server anew
        time.sleep(_LOOK_AGAIN_S)


def remove_checkpoints(parts: Parts) -> None:
    """Drops what only a resume needs, once the stage's result is published."""
    for name in (CHECKPOINTS, BEST):
        parts.remove(name)
    for attempt in (parts.folder / "attempts").glob("*/universal"):
        shutil.rmtree(attempt, ignore_errors=True)


def remove_half_deleted(parts: Parts) -> None:
    """Drops what a rank that died left half written or half deleted; called while none runs."""
    for name in (CHECKPOINTS, BEST):
        for leftover in (parts.output / name).glob(".step-*.partial-*"):
            delete(leftover)


class Checkpoints:
    """One rank's part in writing and loading. Every rank must make the same calls in the same order.

    `probe(step)` gives the loss, without randomness, of one pack that every rank can read: the same number
    before a checkpoint and after it is loaded.
    """

    def __init__(
        self,
        engine: "Engine",
        parts: Parts,
        keep: int,
        probe: Callable[[int], float],
        *,
        kernels: str,
        before_publishing: Callable[[], None],
    ):
        """`kernels`: what computes here, in words; a loss computed by others differs more.
        `before_publishing` is called on rank 0."""
        self._engine, self._parts, self._keep, self._probe = engine, parts, keep, probe
        self._before_publishing = before_publishing
        self._kernels = engine.of_rank_0(kernels)
        self._pending: tuple[int, Path, dict] | None = None
        self.seconds_stopped = 0.0
        """How long training stood still for the last checkpoint."""

    def restore(self) -> tuple[int, dict[str, float], dict[str, Any]]:
        """(updates done by the last complete checkpoint, the loss before and after as metrics, what `begin`
        was given to keep); 0 and nothing without one.

        Which one is rank 0's choice. A checkpoint of other ranks is taken from its universal form, which
        the driver has made. Raises CheckpointDiffers when the loss is not that of the checkpoint.
        """
        steps = self._engine.of_rank_0([step for step, _ in checkpoints(self._parts)])
        if not steps:
            return 0, {}, {}
        step = steps[-1]
        folder = self._parts.output / CHECKPOINTS / f"step-{step:07d}"
        wait_until_visible(folder / FACTS_FILE)
        facts = json.loads((folder / FACTS_FILE).read_text())
        own = facts["world_size"] == self._engine.world_size
        source = folder if own else universal_folder(self._parts, step)
        wait_until_visible(source)
        self._engine.load_checkpoint(source, STATE, universal=not own)
        before, after = facts["probe_loss"], self._probe(step)
        difference = abs(after - before) / max(abs(before), 1e-12)
        logger.info("goes on from step %d (%s): loss %.9g before, %.9g after", step, source, before, after)
        same = facts.get("kernels") in (None, self._kernels)
        tolerance = (_PROBE_TOLERANCE if same else _OTHER_KERNELS_TOLERANCE)[facts["dtype"]]
        if not math.isclose(before, after, rel_tol=tolerance, abs_tol=1e-9):
            raise CheckpointDiffers(
                f"{source} gives a loss of {after:.9g} on a pack that had {before:.9g} when it was written "
                f"(at most {tolerance} relative is rounding; written by {facts.get('kernels', 'others')}, "
                f"now {self._kernels}); remove {folder} to go on from the one before; an object store gives "
                "it back, so with one begin the stage afresh by --force"
            )
        metrics = {
            "resume_loss_before": before,
            "resume_loss_after": after,
            "resume_loss_change": difference,
        }
        return step, metrics, facts.get("kept", {})

    def begin(self, step: int, kept: Mapping[str, Any]) -> None:
        """Starts the checkpoint of `step`; returns when its state is copied to host memory. `kept`: what
        the loop wants back from `restore`, for JSON."""
        name = f"{CHECKPOINTS}/step-{step:07d}"
        self.finish()
        if self._engine.of_rank_0(self._parts.done(name)):
            return
        started = time.monotonic()
        facts = {
            "kept": dict(kept),
            "kernels": self._kernels,
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
            self._before_publishing()
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
