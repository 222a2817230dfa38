"""Time and peak memory of planning a large synthetic index: columns, summary, a seek, a walk.

    python -m benchmarks.planning --num-samples 50000000 --folder /tmp/vico-plan --json

Each phase runs in a process of its own, so that peak resident memory is measured per phase.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.synthetic_index import write_synthetic_index
from data_prep.packs.column_files import column_files
from data_prep.packs.pack import PackBudget
from data_prep.packs.plan import PlanSettings
from data_prep.packs.plan_cache import cached_plan
from data_prep.shards.names import INDEX_FILE

BUDGET = PackBudget(reference_tokens=4096, tiles=13, tokens_full=256)
SETTINGS = PlanSettings(BUDGET, packs_per_step=4, seed=0, epoch=0)
WALKED_STEPS = 2000


def phase_row(name: str, folder: Path, step: int) -> dict[str, Any]:
    """Run one phase in this process; return its seconds, peak memory and counts."""
    cache, about = folder / "cache", {}
    started = time.perf_counter()
    if name == "columns":
        about["samples"] = len(column_files(folder / INDEX_FILE, "train", cache))
    else:
        plan = cached_plan(folder, "train", cache, SETTINGS)
        about = {"packs": plan.num_packs, "steps": plan.num_steps, "windows": plan.num_windows}
    if name in ("seek", "walk"):
        about["step"] = min(step, plan.num_steps - 1)
        plan.step(about["step"])
    seconds = time.perf_counter() - started
    if name == "walk":
        last = min(about["step"] + WALKED_STEPS, plan.num_steps)
        packs = [pack for n in range(about["step"], last) for pack in plan.step(n) if len(pack.rows)]
        seconds = time.perf_counter() - started
        about["fill_tokens"] = sum(pack.num_tokens for pack in packs) / len(packs) / BUDGET.reference_tokens
        about["fill_tiles"] = sum(pack.num_tiles for pack in packs) / len(packs) / BUDGET.tiles
        about["walked_steps"] = last - about["step"]
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"phase": name, "seconds": seconds, "peak_rss_mb": peak_mb, **about}


def child_row(name: str, folder: Path, step: int) -> dict[str, Any]:
    """Run one phase in a process of its own; return its row."""
    command = [sys.executable, "-m", "benchmarks.planning", "--phase", name, "--folder", str(folder)]
    child = subprocess.run([*command, "--step", str(step)], capture_output=True, text=True, check=False)
    if child.returncode:
        raise SystemExit(child.stderr)
    row = json.loads(child.stdout.splitlines()[-1])
    print(f"{name}: {row['seconds']:.2f} s, peak {row['peak_rss_mb']:.0f} MB  {row}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the index and the cache; kept")
    parser.add_argument("--step", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        print(json.dumps(phase_row(options.phase, options.folder, options.step)))
        return
    if not (options.folder / INDEX_FILE).is_file():
        write_synthetic_index(options.folder, options.num_samples)
    names = ["columns", "summary", "seek", "seek", "seek", "walk"]
    rows = [child_row(name, options.folder, options.step) for name in names]
    seeks = sorted(row["seconds"] for row in rows if row["phase"] == "seek")
    if options.json:
        print(json.dumps({"name": "planning", "rows": rows, "ratios": {"seek_s": seeks[1]}}))


if __name__ == "__main__":
    main()
