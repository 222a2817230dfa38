"""The ranks of one process group as programs of their own, with the environment that torchrun would give."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(
    module: str, arguments: Sequence[str], logs: Path, world_size: int, accelerator: str = "cpu"
) -> list[subprocess.Popen]:
    """`python -m module arguments` on each rank, one thread each; output in `logs/rank-<r>.log`."""
    logs.mkdir(parents=True, exist_ok=True)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    same = {**address, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": accelerator}
    ranks = []
    for rank in range(world_size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (logs / f"rank-{rank}.log").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    cwd=ROOT,
                    env={**os.environ, **same, **place},
                    stdout=log,
                    stderr=log,
                )
            )
    return ranks


def finish(ranks: Sequence[subprocess.Popen], logs: Path, timeout_s: float = 400) -> None:
    """Waits for all ranks to end well; fails with the end of the log of one that did not."""
    codes = [rank.wait(timeout=timeout_s) for rank in ranks]
    for rank, code in enumerate(codes):
        assert code == 0, (logs / f"rank-{rank}.log").read_text()[-3000:]
