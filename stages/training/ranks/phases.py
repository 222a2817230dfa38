"""Work of the ranks before the first step and after the last one: the driver shows how far it is."""

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from stages.training.faults import Preempted, stop_notice

logger = logging.getLogger(__name__)
PHASE_FILE = ".phase.json"
"""In an attempt's folder while a phase lasts: [done, total, unit]. Hidden: no object store gets it."""
_WRITE_EVERY_S = 1.0
Item = TypeVar("Item")


def phase_items(
    items: Sequence[Item], total: int, unit: str, attempt_folder: Path, *, may_stop: bool
) -> Iterator[Item]:
    """Yield this rank's items; meanwhile rank 0 writes how many of the `total` of all ranks are done.

    The ranks take turns with items of about equal size, so together they have done about rank 0's number
    times the number of ranks. With `may_stop`, raises Preempted between two items after a stop notice to
    this rank. Ray then ends the others, within their item: the next start finds the items that are done.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    attempt_folder.mkdir(parents=True, exist_ok=True)
    file, written_s = attempt_folder / PHASE_FILE, -_WRITE_EVERY_S
    with stop_notice(attempt_folder, rank) as notice:
        try:
            for number, item in enumerate(items):
                if may_stop and notice.given():
                    raise Preempted(f"rank {rank} got a stop notice; its {unit} so far are kept")
                if rank == 0 and time.monotonic() - written_s >= _WRITE_EVERY_S:
                    _write(file, min(number * world_size, total), total, unit)
                    written_s = time.monotonic()
                yield item
        finally:
            if rank == 0:
                remove_phase(attempt_folder)


def _write(file: Path, done: int, total: int, unit: str) -> None:
    """Write the file whole or not at all; a folder that cannot be written costs no training."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_text(json.dumps([done, total, unit]))
        os.replace(partial, file)
    except OSError as error:
        logger.info("%s is not written: %s", file, error)


def read_phase(attempt_folder: Path) -> tuple[int, int, str] | None:
    """Return (done, total, unit) of the phase that the ranks are in; None if they are in none."""
    try:
        done, total, unit = json.loads((attempt_folder / PHASE_FILE).read_text())
    except (OSError, ValueError, TypeError):
        return None
    return done, total, unit


def remove_phase(attempt_folder: Path) -> None:
    """Remove what an ended phase, or a start that was killed, left."""
    try:
        (attempt_folder / PHASE_FILE).unlink(missing_ok=True)
    except OSError as error:
        logger.info("%s is not removed: %s", attempt_folder / PHASE_FILE, error)
