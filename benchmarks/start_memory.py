"""Memory per rank at the start of a consistency training under ZeRO-3, models read whole and read in parts.

    python -m benchmarks.start_memory --ranks 2 4 --json

Both models are spread over the ranks (ZeRO-3, `reference: sharded`, bfloat16). Every rank is a process of its
own and builds its engine as the stage does. `whole` reads each model and lets DeepSpeed partition it;
`unread` is what the stage does: each parameter is read when it is partitioned. Both ways run one after the
other. Bytes are resident memory of the process above the level after the imports, as the highest of samples
every 5 ms: `private` memory, on a CPU that of device and host together, and pages of `files`, which the
processes of a node share (of the checkpoint, and of libraries that are loaded later). `spread` counts until
both models are spread, `peak` until the engine is ready, with float32 master weights and buffers. Needs about
9 times the checkpoint in memory.
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

WAYS = ("whole", "unread")
KINDS = {"private": "RssAnon", "files": "RssFile"}
"""Kind of memory -> its field of /proc/self/status."""


class Highest:
    """Samples the highest resident memory since construction, by kind, above its value then."""

    def __init__(self) -> None:
        self._before = self._now()
        self._highest = self._before
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def _now() -> dict[str, int]:
        return {kind: resident_bytes(field) for kind, field in KINDS.items()}

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            now = self._now()
            self._highest = {kind: max(highest, now[kind]) for kind, highest in self._highest.items()}

    def so_far(self) -> dict[str, int]:
        """Return the highest bytes up to now, by kind."""
        return {kind: highest - self._before[kind] for kind, highest in self._highest.items()}

    def end(self) -> dict[str, int]:
        """Stop sampling; return the highest bytes, by kind."""
        self._ended.set()
        self._thread.join()
        return self.so_far()


def rank_row(folder: Path, way: str) -> dict[str, Any]:
    """Start one rank; return its row."""
    import torch
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as ZeroOptimizer

    from cluster.train_settings import TrainSettings
    from stages.consistency import worker
    from stages.consistency.config import ConsistencyConfig
    from stages.consistency.packs import ConsistencySettings
    from stages.parts import Parts
    from stages.training.engine import init_distributed
    from vico.checkpoints import load_model

    init_distributed(timeout_s=1800)
    config = ConsistencyConfig.model_validate({"seed": 0, "optimizer": {"dtype": "bfloat16"}})
    site = TrainSettings.model_validate({"memory": {"zero_stage": 3, "reference": "sharded"}})
    settings = ConsistencySettings(config, folder, folder, Parts(folder, 1), site)
    if way == "whole":
        worker.open_unread = load_model
    highest, started = Highest(), time.perf_counter()
    spread: list[dict[str, int]] = []
    make_master_weights = ZeroOptimizer._create_fp32_partitions

    def noted(optimizer: Any) -> None:
        spread.append(highest.so_far())
        make_master_weights(optimizer)

    ZeroOptimizer._create_fp32_partitions = noted
    engine = worker.build_engine(settings)
    peak = highest.end()
    parameters = engine.module.parameters()
    model_bytes = sum(p.ds_numel * p.element_size() for p in parameters)  # type: ignore[attr-defined]
    torch.distributed.destroy_process_group()
    return {
        "way": way,
        "rank": engine.rank,
        "ranks": engine.world_size,
        "model_bytes": model_bytes,
        **{f"spread_{kind}": number for kind, number in spread[0].items()},
        **{f"spread_{kind}_over_model": round(number / model_bytes, 3) for kind, number in spread[0].items()},
        **{f"peak_{kind}": number for kind, number in peak.items()},
        **{f"peak_{kind}_over_model": round(number / model_bytes, 3) for kind, number in peak.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }


def largest_rows(work: Path, num_ranks: int) -> list[dict[str, Any]]:
    """Run both ways on `num_ranks` ranks; return for each the row of the rank that needs most."""
    rows = []
    for way in WAYS:
        out = work / f"{way}-{num_ranks}"
        finish(
            start_ranks("benchmarks.start_memory", ["--child", str(work), way, str(out)], out, num_ranks), out
        )
        of_ranks = [json.loads(path.read_text()) for path in sorted(out.glob("row-*.json"))]
        rows.append(max(of_ranks, key=lambda row: row["spread_private"] + row["spread_files"]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=8, help="language layers (24: 2.2 GB)")
    parser.add_argument("--folder", type=Path, help="folder for the checkpoint (default: a temporary one)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        work, way, out = options.child
        row = rank_row(Path(work, "model"), way)
        Path(out, f"row-{row['rank']}.json").write_text(json.dumps(row))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        write_checkpoint(Path(work, "model"), options.layers)
        rows = [row for num_ranks in options.ranks for row in largest_rows(Path(work), num_ranks)]
    ratios = {
        f"unread_over_whole_{kind}_{unread['ranks']}_ranks": round(
            unread[f"spread_{kind}"] / whole[f"spread_{kind}"], 3
        )
        for whole, unread in zip(rows[::2], rows[1::2], strict=True)
        for kind in KINDS
    }
    print(json.dumps({"name": "start_memory", "rows": rows, "ratios": ratios}) if options.json else rows)


if __name__ == "__main__":
    main()
