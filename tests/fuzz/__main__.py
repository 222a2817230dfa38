"""Give hostile files to every reader: `python -m tests.fuzz [--minutes 30] [--seed 1] [--only NAME] [--report
FILE]`.

Each reader gets its share of the time in a process of its own. Exit code 1 if there was a fault.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.fuzz.one_target import outside

NAMES = ("row", "lines", "meta", "tar", "parquet", "picture", "index", "model", "pipeline", "site", "store")
_START_S = 180
_HANG_S = 120


def fuzz(name: str, folder: Path, seed: int, seconds: float) -> dict[str, Any]:
    """Fuzz one reader in a process whose home, working folder and temporary folder are watched."""
    secret = outside(folder)
    project = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "HOME": str(secret / "home"),
        "TMPDIR": str(secret / "tmp"),
        "PYTHONPATH": str(project),
        "HF_HUB_OFFLINE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
        "MPLCONFIGDIR": str(folder),
    }
    command = [sys.executable, "-m", "tests.fuzz.one_target", name, str(folder), str(seed), str(seconds)]
    try:
        done = subprocess.run(
            command,
            cwd=secret / "cwd",
            env=environment,
            capture_output=True,
            text=True,
            timeout=_START_S + seconds + _HANG_S,
        )
    except subprocess.TimeoutExpired:
        return _died(name, folder, seed, f"hangs for over {_HANG_S} s")
    if done.returncode:
        return _died(name, folder, seed, f"ended with {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _died(name: str, folder: Path, seed: int, problem: str) -> dict[str, Any]:
    case = folder / "case.pickle"
    kept = folder / "faults" / f"{name}-died-{seed}.pickle"
    kept.parent.mkdir(exist_ok=True)
    if case.exists():
        kept.write_bytes(case.read_bytes())
    fault = {"count": 1, "case": str(kept), "text": problem}
    return {"target": name, "seeds": [seed, seed], "cases": 0, "seconds": 0, "faults": {problem[:60]: fault}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="for all readers together")
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--only", action="append", choices=NAMES, help="only this reader; may be repeated")
    parser.add_argument("--folder", type=Path, help="where cases with faults are kept")
    parser.add_argument("--report", type=Path, help="append the results to this file, one line of JSON each")
    options = parser.parse_args()
    names = options.only or NAMES
    folder = options.folder or Path(tempfile.mkdtemp(prefix="vico-fuzz-"))
    num_faults = 0
    for name in names:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        result = fuzz(name, place, options.seed, 60 * options.minutes / len(names))
        result["ended"] = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
        num_faults += len(result["faults"])
        line = json.dumps(result)
        print(line, flush=True)
        if options.report:
            with options.report.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
