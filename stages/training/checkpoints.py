"""Checkpoints of a training: written in the background and published when the files of all ranks are
complete.

When a checkpoint is written, the digests of its files and the loss of one pack are stored with it; a resume
must find the same files and get the same loss.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from stages.parts import Parts
from stages.training.state_digests import FileDigest, UnsafeState, differences

if TYPE_CHECKING:
    from stages.training.engine import Engine


logger = logging.getLogger(__name__)
CHECKPOINTS, BEST = "checkpoints", "best"
METADATA_FILE = "facts.json"
"""Beside the files of the ranks: what must be known about a checkpoint before it is loaded."""
STATE = "state"
"""The folder of the ranks' files within a checkpoint."""
_PROBE_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
_PROBE_STEP = 1  # always the same pack, which is decoded once
_OTHER_KERNELS_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
"""For a loss that is computed by other kernels than before (another device, compiled layers): it is a small
difference of two similar distributions, so that rounding has a large share in it."""
_LOOK_AGAIN_S = 0.5
_VISIBLE_S = 120.0
"""How long a folder that one node has published may be invisible on another (NFS: up to a minute)."""


class CheckpointDiffers(RuntimeError):
    """A checkpoint does not have the files, or does not give the loss, that were stored when it was
    written."""


class CheckpointMetadata(TypedDict):
    """The content of `facts.json`. Checkpoints of early versions lack some keys."""

    world_size: int
    zero_stage: int
    dtype: str
    """float32 or bfloat16."""
    probe_loss: float
    probe_step: NotRequired[int]  # the update whose first pack was probed; early versions: `step`
    kept: NotRequired[dict[str, Any]]
    """What the loop gave to `Checkpoints.begin`."""
    kernels: NotRequired[str]
    step: NotRequired[int]
    fingerprint: NotRequired[str]
    offload: NotRequired[str]
    files: NotRequired[dict[str, FileDigest]]
    """Name below `state` -> digest."""


@dataclass(frozen=True)
class ResumePoint:
    """Where a training starts: the number of updates done, metrics of the loading, and what `begin` was
    given."""

    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, Any] = field(default_factory=dict)


def checkpoints(parts: Parts) -> list[tuple[int, Path]]:
    """Return (step, folder) of every complete checkpoint, oldest first."""
    named = ((path.name.removeprefix("step-"), path) for path in parts.output.glob(f"{CHECKPOINTS}/step-*"))
    return sorted((int(step), path) for step, path in named if step.isdigit())  # no copy, such as step-20.bak


def read_metadata(checkpoint: Path) -> CheckpointMetadata:
    """Return the metadata of a checkpoint's folder."""
    metadata: CheckpointMetadata = json.loads((checkpoint / METADATA_FILE).read_text())
    return metadata


def changes(
    checkpoint: Path,
    digests: Mapping[str, FileDigest] | None,
    share: tuple[int, int] = (0, 1),
    check: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """Yield one line for each state file of this rank's share that is not the written one.

    `share` is (rank, world size); `check` is called between files. Checkpoints of early versions have no
    digests: rank 0 says so in the log.
    """
    if digests is not None:
        yield from differences(checkpoint / STATE, digests, share, check)
    elif share[0] == 0:
        logger.warning("%s was written without digests, so changes of its files cannot be seen", checkpoint)


def check_unchanged(checkpoint: Path, lines: Sequence[str], remedy: str) -> None:
    """Raise CheckpointDiffers if there are lines."""
    if lines:
        more = f" (and {len(lines) - 1} more files)" if lines[1:] else ""
        raise CheckpointDiffers(f"{checkpoint / STATE}: {lines[0]}{more}; {remedy}")


def other_checkpoint(parts: Parts, folder: Path) -> str:
    """Return the remedy for a checkpoint that cannot be used: what to remove, and what is used then."""
    older = [path.name for _, path in checkpoints(parts) if path < folder]
    return (
        f"remove {folder} to resume from {older[-1] if older else 'the first step'}; an object store "
        "restores it, so with one restart the stage with --force"
    )


def best_policies(parts: Parts) -> list[Path]:
    """Return the folders of the policies that `select: best` keeps, oldest first."""
    return sorted(parts.output.glob(f"{BEST}/step-*"))


def universal_folder(parts: Parts, step: int) -> Path:
    """Return where the attempt keeps the checkpoint of `step` in the form that any number of ranks can
    load."""
    return parts.attempt_folder / "universal" / f"step-{step:07d}"


def wait_until_visible(path: Path) -> None:
    """Wait until this node sees what another has published; raise RuntimeError if it never does."""
    deadline = time.monotonic() + _VISIBLE_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{path} exists on the node of rank 0 and was not visible here for {_VISIBLE_S:g} s; put "
                "storage (with an object store: work) on a folder that all nodes see"
            )
        os.listdir(path.parent if path.parent.exists() else "/")  # makes an NFS client ask the server again
        time.sleep(_LOOK_AGAIN_S)


def remove_checkpoints(parts: Parts) -> None:
    """Remove what only a resume needs, once the stage's result is published."""
    for name in (CHECKPOINTS, BEST):
        parts.remove(name)
    for universal in parts.below("attempts/*/universal"):
        parts.delete(universal)


def remove_half_deleted(parts: Parts) -> None:
    """Remove what a rank that died left half written or half deleted. Call it while no rank runs."""
    for name in (CHECKPOINTS, BEST):
        for leftover in parts.below(f"output/{name}/.step-*.partial-*"):
            parts.delete(leftover)


class Checkpoints:
    """One rank's part in writing and loading. Every rank must make the same calls in the same order.

    `probe(step)` returns the loss of one pack that every rank can read, without randomness: the same number
    before a checkpoint is written and after it is loaded.
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
        """`kernels` says in words what computes here; with other kernels the probed loss may differ more.
        `before_publishing` is called on rank 0."""
        self._engine, self._parts, self._keep, self._probe = engine, parts, keep, probe
        self._before_publishing = before_publishing
        self._kernels: str = engine.of_rank_0(kernels)
        self._pending: tuple[int, Path, CheckpointMetadata] | None = None
        self.seconds_stopped = 0.0
        """How long training was stopped for the last checkpoint."""

    def restore(self) -> ResumePoint:
        """Load the last complete checkpoint, if there is one, and return where training resumes.

        Rank 0 chooses the checkpoint. If another number of ranks wrote it, its universal form is loaded,
        which the driver has made. Raises CheckpointDiffers if the files or the loss are not the stored ones.
        """
        steps = self._engine.of_rank_0([step for step, _ in checkpoints(self._parts)])
        if not steps:
            return ResumePoint()
        step = steps[-1]
        folder = self._parts.output / CHECKPOINTS / f"step-{step:07d}"
        wait_until_visible(folder / METADATA_FILE)
        metadata = read_metadata(folder)
        same_ranks = metadata["world_size"] == self._engine.world_size
        source = folder if same_ranks else universal_folder(self._parts, step)
        wait_until_visible(source)
        self._load(folder, source, universal=not same_ranks)
        before, after = metadata["probe_loss"], self._probe(metadata.get("probe_step", step))
        logger.info("resuming from step %d (%s): loss %.9g before, %.9g after", step, source, before, after)
        self._compare_losses(metadata, after, folder, source)
        metrics = {
            "resume_loss_before": before,
            "resume_loss_after": after,
            "resume_loss_change": abs(after - before) / max(abs(before), 1e-12),
        }
        return ResumePoint(step, metrics, metadata.get("kept", {}))

    def _load(self, folder: Path, source: Path, *, universal: bool) -> None:
        """Load the files in `source` if they are the written ones; each rank reads its share of them."""
        digests = self._engine.of_rank_0(read_metadata(source).get("files"))
        share = self._engine.rank, self._engine.world_size
        lines = self._engine.of_all_ranks(list(changes(source, digests, share)))
        remedy = (
            f"remove {source}, and it is converted again"
            if universal
            else other_checkpoint(self._parts, folder)
        )
        check_unchanged(source, [line for of_rank in lines for line in of_rank], remedy)
        try:
            self._engine.load_checkpoint(source, STATE, universal=universal)
        except UnsafeState as error:
            raise CheckpointDiffers(f"{source}: {error}; {remedy}") from error

    def _compare_losses(self, metadata: CheckpointMetadata, after: float, folder: Path, source: Path) -> None:
        """Raise CheckpointDiffers if the loss after loading differs from the stored one by more than
        rounding."""
        before = metadata["probe_loss"]
        same_kernels = metadata.get("kernels") in (None, self._kernels)
        tolerance = (_PROBE_TOLERANCE if same_kernels else _OTHER_KERNELS_TOLERANCE)[metadata["dtype"]]
        if not math.isclose(before, after, rel_tol=tolerance, abs_tol=1e-9):
            raise CheckpointDiffers(
                f"{source} gives a loss of {after:.9g} on a pack that had {before:.9g} when it was written "
                f"(rounding is at most {tolerance} relative; written by {metadata.get('kernels', 'others')}, "
                f"now {self._kernels}); {other_checkpoint(self._parts, folder)}"
            )

    def begin(self, step: int, kept: Mapping[str, Any]) -> None:
        """Start to write the checkpoint of `step`; return when its state is copied to host memory.

        `kept` is what the loop wants back from `restore`; it must fit into JSON.
        """
        name = f"{CHECKPOINTS}/step-{step:07d}"
        self.finish()
        if self._engine.of_rank_0(self._parts.done(name)):
            return
        started = time.monotonic()
        metadata: CheckpointMetadata = {
            "kept": dict(kept),
            "kernels": self._kernels,
            "step": step,
            "fingerprint": self._parts.folder.name,
            "world_size": self._engine.world_size,
            "zero_stage": self._engine.settings.zero_stage,
            "offload": self._engine.settings.offload,
            "dtype": str(self._engine.settings.dtype).removeprefix("torch."),
            "probe_loss": self._probe(_PROBE_STEP),
            "probe_step": _PROBE_STEP,
        }
        folder = self._parts.partial(name)
        if self._engine.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # half written by an earlier start of this attempt
        self._engine.barrier()
        self._engine.write_checkpoint(folder, STATE)
        self._pending = step, folder, metadata
        self.seconds_stopped = time.monotonic() - started

    def written(self) -> bool:
        """Return whether this rank has nothing left to write; raise what the writing raised."""
        return self._engine.checkpoint_written()

    def publish_if(self, all_written: bool) -> None:
        """Publish the pending checkpoint if all ranks have written theirs, and remove old ones."""
        if self._pending is None or not all_written:
            return
        (step, folder, metadata), self._pending = self._pending, None
        metadata["files"] = self._engine.checkpoint_digests(folder, STATE)
        if self._engine.rank == 0:
            for script in folder.glob("*.py"):  # DeepSpeed's: programs that others would run from storage
                script.unlink()
            (folder / METADATA_FILE).write_text(json.dumps(metadata))
            self._before_publishing()
            self._parts.publish(f"{CHECKPOINTS}/step-{step:07d}")
            for _, old in checkpoints(self._parts)[: -self._keep]:
                self._parts.remove(f"{CHECKPOINTS}/{old.name}")

    def finish(self) -> None:
        """Wait for the pending checkpoint, if there is one, and publish it."""
        if self._pending is not None:
            self._engine.wait_for_checkpoint()
            self._engine.barrier()
            self.publish_if(True)
        self._engine.barrier()
