"""Memory per rank at the start of a consistency training, while model and reference are spread over ranks.

    python -m benchmarks.start_memory --ranks 2 --json

The checkpoint has 2 GB; both models are sharded (ZeRO-3, `reference: sharded`). Every rank is a process of
its own. `anonymous` is private memory of the process: the highest of samples taken every 5 ms, above the
level after the imports. `mapped` is the checkpoint's pages, which all ranks of a node share and the kernel
may reclaim. Needs 2.5 GB of disk and twice the model in memory.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.export_memory import resident_bytes, write_checkpoint
from tests.numerics.ranks import finish, start_ranks


class Highest:
    """Samples the highest `RssAnon` and `RssFile` since construction, above their values then."""

    def __init__(self) -> None:
        self._fields = ("RssAnon", "RssFile")
        self._before = {field: resident_bytes(field) for field in self._fields}
        self._highest = dict(self._before)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            for field in self._fields:
                self._highest[field] = max(self._highest[field], resident_bytes(field))

    def end(self) -> dict[str, int]:
        """Stop sampling; return the bytes by field."""
        self._ended.set()
        self._thread.join()
        return {field: self._highest[field] - self._before[field] for field in self._fields}


def rank_row(folder: Path) -> dict[str, Any]:
    """Start one rank as `stages/consistency/worker.py` does; return its row."""
    import torch

    from stages.consistency.worker import reference_placement
    from stages.training.engine import Engine, init_distributed
    from stages.training.engine_settings import EngineSettings
    from stages.training.parameter_groups import ParameterGroup, Rate
    from vico.checkpoints import load_model
    from vico.objectives.consistency import ConsistencyTask

    init_distributed(timeout_s=1800)
    settings = EngineSettings(1, torch.bfloat16, 1.0, (0.9, 0.95), 3, "none", {})
    highest, started = Highest(), time.perf_counter()
    policy, reference = (load_model(folder, torch.bfloat16) for _ in range(2))
    loaded = highest.end()
    highest = Highest()
    task = ConsistencyTask(policy, reference, 256, **reference_placement("sharded"))
    parameters = tuple(task.parameters())
    model_bytes = sum(p.numel() * p.element_size() for p in parameters)
    engine = Engine(task, [ParameterGroup(parameters, Rate(), 0.0)], settings)
    spread = highest.end()
    torch.distributed.destroy_process_group()
    return {
        "rank": engine.rank,
        "ranks": engine.world_size,
        "model_bytes": model_bytes,
        "loading_anonymous": loaded["RssAnon"],
        "loading_mapped": loaded["RssFile"],
        "spreading_anonymous": spread["RssAnon"],
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="folder for the checkpoint (default: a temporary one)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        row = rank_row(options.child / "model")
        (options.child / f"row-{row['rank']}.json").write_text(json.dumps(row))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        write_checkpoint(Path(work, "model"))
        ranks = start_ranks("benchmarks.start_memory", ["--child", work], Path(work), options.ranks)
        finish(ranks, Path(work))
        rows = [json.loads(path.read_text()) for path in sorted(Path(work).glob("row-*.json"))]
    largest = max(rows, key=lambda row: row["loading_anonymous"] + row["spreading_anonymous"])
    ratios = {
        f"{what}_over_model": round(largest[what] / largest["model_bytes"], 3)
        for what in ("loading_anonymous", "spreading_anonymous")
    }
    print(json.dumps({"name": "start_memory", "rows": rows, "ratios": ratios}) if options.json else rows)


if __name__ == "__main__":
    main()
