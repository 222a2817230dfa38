"""A checkpoint of one number of ranks made loadable by another, through DeepSpeed's universal format.

The driver converts before the ranks start: none of them waits, and no collective times out.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from stages.parts import Parts
from stages.train_checkpoints import FACTS_FILE, STATE, checkpoints, universal_folder
from vico.errors import UserError

logger = logging.getLogger(__name__)


def convert_last_checkpoint(
    parts: Parts, num_workers: int, zero_stage: int, offload: str = "none"
) -> Path | None:
    """Converts the last checkpoint where another number of ranks wrote it; its universal folder, or None
    where none is needed.

    The folder belongs to the attempt and is renamed into place when it is whole. Raises UserError where the
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
        _convert(folder / STATE, partial / STATE, facts["zero_stage"])
        os.replace(partial, target)
        logger.info("%s of %s ranks converted for %s", folder, facts["world_size"], num_workers)
    return target


def remove_conversions(parts: Parts, keep: Path | None = None) -> None:
    """Removes what was converted for an earlier checkpoint or attempt: each is as large as a checkpoint."""
    for old in parts.folder.glob("attempts/*/universal/*"):
        if old != keep:
            shutil.rmtree(old, ignore_errors=True)


def _convert(source: Path, target: Path, zero_stage: int) -> None:
    """DeepSpeed's own program in a process of its own: the driver need not import DeepSpeed."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    if zero_stage < 3:
        command.append("--inject_missing_state")
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{source} could not be converted for another number of ranks: "
            f"{done.stdout.strip().splitlines()[-1] if done.stdout.strip() else 'no output'}"
        )
