"""Give hostile files to one reader for some time, in a process of its own: `python -m tests.fuzz.one_target`.

Prints one line of JSON for each reader, with its counts and faults. The case in work is in `case.pickle`, so
that the caller has it if the process dies or hangs.
"""

import hashlib
import json
import logging
import pickle
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import Target, targets
from tests.fuzz.watch import KernelWatch, PythonWatch

CASE_S = 20.0
"""A case that takes more processor time is a fault."""
CASE_BYTES = 1 << 30
"""A case that needs this much more memory than the process had before is a fault."""
_EXAMPLES = 200
_LEAST_CASES = 20
"""However short the time is."""
_PROJECT = Path(__file__).parents[2]


class Fault(AssertionError):
    """A case that crashed, took too long, took too much memory or touched something outside."""


class Fuzzer:
    """One target with its limits and watches; `folder` has `good`, `case` and the watched `outside`."""

    def __init__(self, target: Target, folder: Path):
        self.target, self.folder = target, folder
        self.faults: dict[str, dict[str, Any]] = {}
        self.answers: Counter[str] = Counter()
        self.cases, self.longest_s, self.most_bytes = 0, 0.0, 0
        self._kernel, self._python = KernelWatch(folder / "outside"), PythonWatch((folder / "case",))

    def one(self, data: Any) -> None:
        """Read one case. Raises Fault for one that is new."""
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        (self.folder / "case.pickle").write_bytes(pickle.dumps(data))
        self.cases += 1
        Path("/proc/self/clear_refs").write_text("5")
        before, start = _status("VmRSS"), time.process_time()
        problem = self._read(case, data)
        seconds, num_bytes = time.process_time() - start, _status("VmHWM") - before
        self.longest_s, self.most_bytes = max(self.longest_s, seconds), max(self.most_bytes, num_bytes)
        events = [*self._kernel.events(), *self._python.taken()]
        if events:
            problem = f"outside: {events[0]}"
        elif seconds > CASE_S:
            problem = problem or f"time: over {CASE_S:.0f} s"
        elif num_bytes > CASE_BYTES:
            problem = problem or f"memory: over {CASE_BYTES >> 20} MiB"
        if problem is not None:
            is_new = problem not in self.faults
            fault = self.faults.setdefault(problem, {"count": 0, "case": "", "text": ""})
            fault["count"] += 1
            if is_new or len(pickle.dumps(data)) < fault.get("bytes", 1 << 30):
                fault.update(self._kept(data, problem), text=self._text)

    def _read(self, case: Path, data: Any) -> str | None:
        self._text = ""
        try:
            with self._python.on():
                self.target.read(case, data)
            self.answers["read"] += 1
        except self.target.answers as error:
            self.answers[type(error).__name__] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            self._text = traceback.format_exc()[-3000:]
            return f"{type(error).__name__} at {_place(error)}"
        return None

    def _kept(self, data: Any, problem: str) -> dict[str, Any]:
        pickled = pickle.dumps(data)
        kept = (
            self.folder
            / "faults"
            / f"{self.target.name}-{hashlib.sha256(problem.encode()).hexdigest()[:8]}.pickle"
        )
        kept.parent.mkdir(exist_ok=True)
        kept.write_bytes(pickled)
        return {"case": str(kept), "bytes": len(pickled)}

    def run(self, first_seed: int, seconds: float) -> dict[str, Any]:
        """Draw cases until the time is over, 200 with each seed; return counts and faults."""
        start, number = time.monotonic(), first_seed
        while time.monotonic() - start < seconds:
            self._run_seed(number, start + seconds)
            number += 1
        return {
            "target": self.target.name,
            "seeds": [first_seed, number - 1],
            "cases": self.cases,
            "seconds": round(time.monotonic() - start),
            "longest_s": round(self.longest_s, 2),
            "most_mib": self.most_bytes >> 20,
            "answers": dict(self.answers),
            "faults": self.faults,
        }

    def _run_seed(self, number: int, deadline: float) -> None:
        @seed(number)
        @settings(
            max_examples=_EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(self.target.cases)
        def cases(data: Any) -> None:
            if time.monotonic() < deadline or self.cases < _LEAST_CASES:
                self.one(data)

        cases()


def _place(error: BaseException) -> str:
    """Return file and line of the project's innermost frame, and the file of the innermost one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if str(_PROJECT) in frame.filename and "/tests/" not in frame.filename]
    last = own[-1] if own else frames[-1]
    where = last.filename.removeprefix(f"{_PROJECT}/")
    return f"{where}:{last.lineno} ({Path(frames[-1].filename).name})"


def _status(field: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def outside(folder: Path) -> Path:
    """Write the neighbours that no reader may read or change; return their folder."""
    secret = folder / "outside"
    for name in ("home/.config", "cwd", "store/shard", "tmp"):
        (secret / name).mkdir(parents=True, exist_ok=True)
    for name in ("secret.png", "home/.netrc", "cwd/a.jsonl", "store/shard/record.json", "secret.json"):
        (secret / name).write_text("secret")
    return secret


def main(arguments: list[str]) -> None:
    """Fuzz TARGET (or several: `row,tar`) in FOLDER from SEED on, each for SECONDS."""
    names, folder, first_seed, seconds = (
        arguments[0].split(","),
        Path(arguments[1]),
        int(arguments[2]),
        float(arguments[3]),
    )
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    built = targets(folder / "good")
    outside(folder)
    _limit_memory()
    for name in names:
        print(json.dumps(Fuzzer(built[name], folder).run(first_seed, seconds)), flush=True)


def _limit_memory() -> None:
    """A case that asks for far more memory than it may have gets none, instead of filling the machine."""
    limit = _status("VmSize") + 4 * CASE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main(sys.argv[1:])
