"""Commands of the parts of `benchmarks/device.py`: output in a log, a time limit, nothing left running.

A command runs in a session of its own. Ray's processes leave that session, so every process that a command
starts is known by a mark in its environment, which children inherit, and all of them end with the command:
what stays on the device would falsify the next part.
"""

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
END_S = 20.0
"""How long a stopped command may take to end by itself."""
_MARK = "VICO_DEVICE_COMMAND"


class PartFailed(RuntimeError):
    """A part that failed after it had some results."""

    def __init__(self, message: str, results: Any):
        super().__init__(message)
        self.results = results


@dataclass
class Runner:
    """Runs the commands of parts, with their output in `log.txt`."""

    out: Path
    dry_run: bool
    scratch: Path
    part_ends_s: float
    """When the part that runs must have ended, by the monotonic clock."""
    part: str = ""
    """Its name."""
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.out / "log.txt"

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def seconds_left(self) -> float:
        """Return the seconds that the part has left."""
        return self.part_ends_s - time.monotonic()

    def output(self, command: Sequence[str], reserve_s: float = 0.0) -> str:
        """Run a command and return its standard output.

        Raises RuntimeError if it fails, and stops it `reserve_s` before the part's end.
        """
        limit_s = self.seconds_left() - reserve_s
        if limit_s <= 0:
            raise RuntimeError("no time left")
        printed, mark = self.scratch / "output.txt", uuid.uuid4().hex
        with self.log.open("a", encoding="utf-8") as log, printed.open("w+", encoding="utf-8") as output:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment(mark),
                stdout=output,
                stderr=log,
                start_new_session=True,
            )
            try:
                process.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"stopped after {limit_s:.0f} s") from None
            finally:
                _end(process, mark)
                text = printed.read_text(encoding="utf-8", errors="replace")
                log.write(text)
        if process.returncode:
            raise RuntimeError(f"ended with {process.returncode}: {_last_error(self.log)}")
        return text

    def json_output(self, command: Sequence[str], reserve_s: float = 0.0) -> Any:
        """Return the JSON in the last line that a command prints; raise RuntimeError as `output` does."""
        lines = self.output(command, reserve_s).strip().splitlines()
        if not lines:
            raise RuntimeError("printed nothing")
        return json.loads(lines[-1])

    @property
    def rows_file(self) -> Path:
        """Where the rows of the part are while it runs, for the case that this process is killed."""
        return self.out / f"rows-{self.part}.jsonl"

    def rows(self, command: Sequence[str]) -> list[dict[str, Any]]:
        """Run a command that appends a line of JSON per row to the file after `--out`; return the rows.

        Raises PartFailed with the rows so far if it fails.
        """
        path = self.rows_file
        path.unlink(missing_ok=True)
        error = ""
        try:
            self.output((*command, "--out", str(path)))
        except RuntimeError as failed:
            error = str(failed)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be cut off
        if error:
            raise PartFailed(error, {"rows": rows})
        return rows

    def _environment(self, mark: str) -> dict[str, str]:
        return {
            "TORCH_EXTENSIONS_DIR": str(self.scratch / "extensions"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),
            **os.environ,
            "DS_ACCELERATOR": self.device,
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            _MARK: mark,
        }


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Ask a command that still runs to end, then kill it, and kill what it has left running."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pid in _marked(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _marked(mark: str) -> list[int]:
    """Return the ids of the running processes with this mark in the environment they were started with."""
    entry = f"{_MARK}={mark}".encode()
    ids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            entries = path.read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another user's
            continue
        if entry in entries:
            ids.append(int(path.parent.name))
    return ids


def _last_error(path: Path) -> str:
    """Return the last line of the last command that names an error, or its last line."""
    text = path.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines)[-1][:300]
