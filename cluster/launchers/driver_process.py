"""The program of every submitted job: start the driver, start it again when it died, and say how it ended.

    python -m cluster.launchers.driver_process [--restarts N] [--pause S] [--marker FILE] [--pid-file FILE]
        -- COMMAND...

Schedulers that lose a driver to the kernel's out-of-memory killer call the job failed, or start a whole new
cluster. This program starts only the driver again, which resumes. A driver that ends by itself has decided
how, so its exit code is passed on.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""SIGUSR1 is what Slurm sends before a time limit; the driver knows SIGTERM only."""


class DriverProcess:
    """One driver after the other, until one ends by itself or there are no restarts left."""

    def __init__(self, command: list[str], restarts: int, pause_s: float) -> None:
        self.command, self.restarts, self.pause_s = command, restarts, pause_s
        self._child: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    def exit_code(self) -> int:
        """Run the driver to its end; a driver that a signal killed has 128 + its number."""
        for number in _STOPS:
            signal.signal(number, self._stop)
        restarts = self.restarts
        while True:
            code = self._run()
            if code >= 0 or self._is_stopped or not restarts:
                return code if code >= 0 else 128 - code
            restarts -= 1
            name = signal.Signals(-code).name
            _say(f"the driver died of {name}; starts again in {self.pause_s:g} s ({restarts} restarts left)")
            self._wait()
            if self._is_stopped:
                return 128 - code

    def _run(self) -> int:
        self._child = subprocess.Popen(self.command, preexec_fn=die_with_parent)
        return self._child.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + self.pause_s
        while not self._is_stopped and time.monotonic() < deadline:
            time.sleep(0.1)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Pass a stop on. A scheduler may have sent it to the driver too, which obeys only the first."""
        self._is_stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """In a child, before its program starts: ask for a signal when the thread that started it ends or is
    killed, so that no child works on alone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _say(text: str) -> None:
    sys.stderr.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}\n")
    sys.stderr.flush()


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main(arguments: list[str]) -> int:
    """Run the command after `--`; return its exit code."""
    parser = argparse.ArgumentParser(prog="driver_process")
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--pause", type=float, default=10.0)
    parser.add_argument("--marker", type=Path, help="written last, with the exit code as JSON")
    parser.add_argument("--pid-file", type=Path, help="written first, with the number of this process")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    if options.marker is not None:
        options.marker.unlink(missing_ok=True)  # of an earlier start of this job
    if options.pid_file is not None:
        _write(options.pid_file, f"{os.getpid()}\n")
    code = DriverProcess(options.command, options.restarts, options.pause).exit_code()
    if options.marker is not None:
        _write(options.marker, json.dumps({"exit_code": code}))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
