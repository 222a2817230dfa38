"""A checkpoint of one number of ranks made loadable by another, through DeepSpeed's universal format.

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

from stages.parts import Parts
from stages.training.checkpoints import FACTS_FILE, STATE, checkpoints, universal_folder
from vico.errors import UserError

logger = logging.getLogger(__name__)
_MOST_CONVERTERS = 8
_CHECK_S = 0.5


class ConversionFailed(RuntimeError):
    """DeepSpeed's program ended badly."""


def convert_last_checkpoint(
    parts: Parts,
    num_workers: int,
    zero_stage: int,
    offload: str = "none",
    *,
    note: Callable[[str], None] = logger.info,
    check: Callable[[], None] = lambda: None,
) -> Path | None:
    """Converts the last checkpoint where another number of ranks wrote it; its universal folder, or None
    where none is needed.

    The folder belongs to the attempt and is renamed into place when it is whole. `note` is told before that
    begins, and what `check` raises, which is asked all the time, ends it. Raises UserError where the
    checkpoint is of another ZeRO stage, or of another fingerprint (copied here by hand).
    """
    found = checkpoints(parts)
    if not found:
        return None
    step, folder = found[-1]
    facts = json.loads((folder / FACTS_FILE).read_text())
    written_for = facts.get("fingerprint", parts.folder.name)  # not noted before there was the question
    if written_for != parts.folder.name:
        raise UserError(
            f"{folder} was written for the fingerprint {written_for[:12]}, and this stage has "
            f"{parts.folder.name[:12]}: other settings or data; remove it, or go on where it was written"
        )
    if facts["zero_stage"] != zero_stage:
        raise UserError(
            f"train.zero_stage={zero_stage}, and {folder} was written at ZeRO-{facts['zero_stage']}, whose "
            f"files no other stage loads; set train.zero_stage={facts['zero_stage']} in the site, or start "
            "the stage anew with --force"
        )
    other_offload = facts.get("offload", offload) != offload
    if other_offload and zero_stage == 1 and facts["dtype"] == "bfloat16":
        raise UserError(
            f"train.offload={offload}, and {folder} was written with offload={facts['offload']}, which at "
            "ZeRO-1 in bfloat16 makes other files; set it back in the site, or start the stage anew with "
            "--force"
        )
    target = universal_folder(parts, step)
    needed = facts["world_size"] != num_workers
    remove_conversions(parts, target if needed else None)
    if not needed:
        return None
    if not target.exists():
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = [path.stat().st_size for path in (folder / STATE).rglob("*") if path.is_file()]
        note(
            f"converts {folder.name} ({sum(files) / 1e9:.1f} GB) of {facts['world_size']} ranks for "
            f"{num_workers}, then goes on"
        )
        num_processes, source = num_converters(max(files)), folder / STATE
        try:
            _convert(source, partial / STATE, facts["zero_stage"], num_processes, check)
        except ConversionFailed as failed:
            if num_processes == 1:
                raise
            logger.warning("%s; again with one process, which takes the least memory", failed)
            shutil.rmtree(partial / STATE, ignore_errors=True)
            _convert(source, partial / STATE, facts["zero_stage"], 1, check)
        os.replace(partial, target)
    return target


def remove_conversions(parts: Parts, keep: Path | None = None) -> None:
    """Removes what was converted for an earlier checkpoint or attempt: each is as large as a checkpoint."""
    for old in parts.folder.glob("attempts/*/universal/*"):
        if old != keep:
            shutil.rmtree(old, ignore_errors=True)


def num_converters(largest_bytes: int) -> int:
    """Processes that convert at once: each holds a rank's file, and what it makes of it."""
    fit = psutil.virtual_memory().available // (3 * max(largest_bytes, 1))
    return max(1, min(_MOST_CONVERTERS, len(os.sched_getaffinity(0)), fit))


def _convert(
    source: Path, target: Path, zero_stage: int, num_processes: int, check: Callable[[], None]
) -> None:
    """DeepSpeed's own program in a process of its own: the driver need not import DeepSpeed."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += [f"--num_{step}_workers={num_processes}" for step in ("extract", "merge")]
    if zero_stage < 3:
        command.append("--inject_missing_state")
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        # a group of its own, for it has children that are to end with it
        program = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while program.poll() is None:
                check()
                time.sleep(_CHECK_S)
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()
        if program.returncode:
            output.seek(0)
            said = output.read().strip().splitlines()
            raise ConversionFailed(
                f"{source} could not be converted for another number of ranks: "
                f"{said[-1] if said else 'no output'}"
            )
