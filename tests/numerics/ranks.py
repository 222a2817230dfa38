"""Run the ranks of one process group as separate programs, in the environment that torchrun would make."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]


def start_ranks(
    module: str, arguments: Sequence[str], logs: Path, world_size: int, accelerator: str = "cpu"
) -> list[subprocess.Popen[bytes]]:
    """Start `python -m module arguments` on each rank, with one thread each; output in
    `logs/rank-<r>.log`."""
    logs.mkdir(parents=True, exist_ok=True)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    environment = {**address, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": accelerator}
    ranks = []
    for rank in range(world_size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (logs / f"rank-{rank}.log").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    cwd=ROOT,
                    env={**os.environ, **environment, **own},
                    stdout=log,
                    stderr=log,
                )
            )
    return ranks


def start_scenarios(
    module: str, folder: Path, scenarios: Sequence[Mapping[str, Any]], world_size: int
) -> tuple[list[subprocess.Popen[bytes]], Path]:
    """Start ranks that train the scenarios one after another; return them and the folder of their logs."""
    logs = folder / f"logs-{scenarios[0]['name']}-{scenarios[0].get('attempt', 1)}"
    texts = [json.dumps(scenario) for scenario in scenarios]
    return start_ranks(module, [str(folder), *texts], logs, world_size), logs


def check_ranks(ranks: Sequence[subprocess.Popen[bytes]], logs: Path) -> bool:
    """Return whether all have ended. If one failed, kill the others, which would wait for it, and fail with
    the end of its log."""
    codes = [rank.poll() for rank in ranks]
    if failed := [rank for rank, code in enumerate(codes) if code]:
        stop_ranks(ranks)
        pytest.fail(f"rank {failed[0]}: {(logs / f'rank-{failed[0]}.log').read_text()[-3000:]}")
    return None not in codes


def stop_ranks(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()
        rank.wait()


def finish(ranks: Sequence[subprocess.Popen[bytes]], logs: Path) -> None:
    """Wait until all ranks have succeeded; fail with the end of the log of one that did not."""
    _wait(lambda: check_ranks(ranks, logs), ranks, logs)


def wait_for_ranks(
    ranks: Sequence[subprocess.Popen[bytes]], logs: Path, condition: Callable[[], object]
) -> None:
    """Wait for a condition; fail when the ranks end before that."""

    def holds() -> object:
        return condition() or (check_ranks(ranks, logs) and pytest.fail("the ranks ended before that"))

    _wait(holds, ranks, logs)


def _wait(condition: Callable[[], object], ranks: Sequence[subprocess.Popen[bytes]], logs: Path) -> None:
    try:
        wait_until(condition, or_else=lambda: (logs / "rank-0.log").read_text()[-3000:])
    except BaseException:
        stop_ranks(ranks)
        raise
