"""Make a checkpoint of one number of ranks loadable by another, with DeepSpeed's universal format.

The driver converts before the ranks start: none of them waits, and no collective times out.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.sources import in_worker
from cluster.sources.driver import driver_code, python_path
from cluster.sources.reports import accept_files
from cluster.train_settings import MemorySettings
from stages.parts import Parts
from stages.training.checkpoints import (
    METADATA_FILE,
    STATE,
    CheckpointMetadata,
    changes,
    check_unchanged,
    checkpoints,
    other_checkpoint,
    read_metadata,
    universal_folder,
)
from stages.training.state_digests import digests_below
from vico.errors import UserError, last_line

logger = logging.getLogger(__name__)
_MOST_CONVERTERS = 8
_CHECK_S = 0.5


class ConversionFailed(RuntimeError):
    """DeepSpeed's program failed."""


def convert_last_checkpoint(
    parts: Parts,
    num_workers: int,
    memory: MemorySettings,
    *,
    note: Callable[[str], None] = logger.info,
    check: Callable[[], None] = lambda: None,
) -> Path | None:
    """Convert the last checkpoint if another number of ranks wrote it, and return its universal folder; None
    if there is nothing to convert.

    The folder belongs to the attempt and is renamed into place when it is complete. `note` gets a line before
    the conversion begins; `check` is called all the time, and what it raises ends the conversion. Raises
    UserError if the checkpoint has another ZeRO stage, or another fingerprint (it was copied here by hand).
    """
    written = checkpoints(parts)
    if not written:
        return None
    step, folder = written[-1]
    metadata = read_metadata(folder)
    _check_fits(metadata, folder, parts, memory)
    target = universal_folder(parts, step)
    is_needed = metadata["world_size"] != num_workers
    remove_conversions(parts, target if is_needed else None)
    if not is_needed:
        return None
    if not target.exists():
        num_bytes = [path.stat().st_size for path in (folder / STATE).rglob("*") if path.is_file()]
        note(
            f"converts {folder.name} ({sum(num_bytes) / 1e9:.1f} GB) of {metadata['world_size']} ranks for "
            f"{num_workers}, then resumes"
        )
        changed = list(changes(folder, metadata.get("files"), check=check))
        check_unchanged(folder, changed, other_checkpoint(parts, folder))
        _convert(folder / STATE, target, metadata["zero_stage"], num_converters(max(num_bytes)), check)
    return target


def _check_fits(metadata: CheckpointMetadata, folder: Path, parts: Parts, memory: MemorySettings) -> None:
    """Raise UserError if this stage cannot load the checkpoint with these settings of the site."""
    fingerprint = metadata.get("fingerprint", parts.folder.name)  # early checkpoints do not have it
    if fingerprint != parts.folder.name:
        raise UserError(
            f"{folder} was written for the fingerprint {fingerprint[:12]}, and this stage has "
            f"{parts.folder.name[:12]}: other settings or data; remove it, or resume where it was written"
        )
    if metadata["zero_stage"] != memory.zero_stage:
        raise UserError(
            f"train.memory.zero_stage={memory.zero_stage}, and {folder} was written at "
            f"ZeRO-{metadata['zero_stage']}, whose files no other stage loads; set "
            f"train.memory.zero_stage={metadata['zero_stage']} in the site, or restart the stage with --force"
        )
    other_offload = metadata.get("offload", memory.offload) != memory.offload
    if other_offload and memory.zero_stage == 1 and metadata["dtype"] == "bfloat16":
        raise UserError(
            f"train.memory.offload={memory.offload}, and {folder} was written with "
            f"offload={metadata['offload']}, which at ZeRO-1 in bfloat16 writes other files; set it back in "
            "the site, or restart the stage with --force"
        )


def remove_conversions(parts: Parts, keep: Path | None = None) -> None:
    """Remove conversions of earlier checkpoints or attempts: each is as large as a checkpoint."""
    for old in parts.below("attempts/*/universal/*"):
        if old != keep:
            parts.delete(old)


def num_converters(largest_bytes: int) -> int:
    """Return how many processes convert at the same time: each holds a rank's file and what it makes of
    it."""
    fit = psutil.virtual_memory().available // (3 * max(largest_bytes, 1))
    return max(1, min(_MOST_CONVERTERS, len(os.sched_getaffinity(0)), fit))


def _convert(
    source: Path, target: Path, zero_stage: int, num_processes: int, check: Callable[[], None]
) -> None:
    """Convert the state in `source` and publish it in `target`; try again with one process if it fails."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _run_deepspeed(source, partial / STATE, zero_stage, num_processes, check)
    except ConversionFailed as error:
        if num_processes == 1:
            raise
        logger.warning("%s; trying again with one process, which needs the least memory", error)
        shutil.rmtree(partial / STATE, ignore_errors=True)
        _run_deepspeed(source, partial / STATE, zero_stage, 1, check)
    digests = digests_below(partial / STATE, check)
    (partial / METADATA_FILE).write_text(json.dumps({"files": digests}))
    os.replace(partial, target)


def _run_deepspeed(
    source: Path, target: Path, zero_stage: int, num_processes: int, check: Callable[[], None]
) -> None:
    """Run DeepSpeed's own program in a process of its own, so that the driver need not import DeepSpeed.

    With -P nothing is imported from the working directory.
    """
    attempt_folder = target.parents[2]  # of attempts/<n>/universal/.step-<s>.partial/<state>
    command = [sys.executable, "-P", in_worker.__file__, str(attempt_folder), driver_code()["digest"]]
    command += ["stages.training.safe_loading"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += [f"--num_{phase}_workers={num_processes}" for phase in ("extract", "merge")]
    if zero_stage < 3:
        command.append("--inject_missing_state")
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        # in a process group of its own, so that its children end with it
        environment = {**os.environ, "PYTHONPATH": python_path()}
        program = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while program.poll() is None:
                check()
                time.sleep(_CHECK_S)
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()
        accept_files(attempt_folder)
        if program.returncode:
            output.seek(0)
            raise ConversionFailed(
                f"{source} could not be converted for another number of ranks: "
                f"{last_line(output.read()) or 'no output'}"
            )
