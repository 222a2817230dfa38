"""Kind `local`: a run in the background of this machine, in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from cluster.launchers.launcher import Job, JobStatus
from cluster.launchers.shared_folder import (
    DRIVER_LOG,
    MARKER,
    PID_FILE,
    FolderJobs,
    end_of_job,
    last_lines,
    write_job_folder,
)
from vico.errors import UserError

_HOST_FILE = "host.json"
_KILL_AFTER_S = 600.0


class LocalJobs(FolderJobs):
    """Background processes of this machine; their files are in `folder`, one folder per job."""

    kind: ClassVar[str] = "local"

    def check(self) -> None:
        """There is nothing to reach."""

    def render(self, job: Job) -> str:
        folder = self.folder / job.name
        variables = [
            f"export {name}={shlex.quote(text)}"
            for name, text in {**self.site.environment, **job.environment()}.items()
        ]
        start = f"nohup {shlex.join(self._command(job))} > {shlex.quote(str(folder / DRIVER_LOG))} 2>&1 &"
        files = [f"# {folder / name}\n{text.rstrip()}" for name, text in job.files.items()]
        return "\n\n".join(["\n".join([f"cd {shlex.quote(str(folder))}", *variables, start]), *files])

    def submit(self, job: Job) -> str:
        folder = self.folder / job.name
        write_job_folder(folder, job, with_sources=self.site.jobs.code == "archive")
        environment = {**os.environ, **self.site.environment, **job.environment()}
        with (folder / DRIVER_LOG).open("wb") as log:
            process = subprocess.Popen(
                self._command(job),
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it outlives this terminal
            )
        facts = {"host": socket.gethostname(), "pid": process.pid, "started": _started(process.pid)}
        (folder / _HOST_FILE).write_text(json.dumps(facts), encoding="utf-8")
        return f"as process {process.pid} of this machine"

    def status(self, name: str) -> JobStatus:
        ended = end_of_job(self.folder / name)
        if ended is not None:
            return ended
        facts = self._facts(name)
        if facts is None:
            return JobStatus("unknown", f"{self.folder / name} has no job of this machine")
        if facts["host"] != socket.gethostname():
            return JobStatus("unknown", f"job {name} works on host {facts['host']}; ask there")
        if _started(facts["pid"]) == facts["started"]:
            return JobStatus("running")
        return end_of_job(self.folder / name) or JobStatus("failed", f"its process {facts['pid']} is gone")

    def logs(self, name: str) -> str:
        return last_lines(self.folder / name / DRIVER_LOG)

    def cancel(self, name: str) -> bool:
        """Stop the process and wait until it is gone; raises UserError if it is on another machine."""
        status, facts = self.status(name), self._facts(name)
        if status.state == "unknown":
            raise UserError(f"RUN: {status.message}")
        if status.state != "running" or facts is None:
            return False
        deadline = time.monotonic() + _KILL_AFTER_S
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(facts["pid"], signal.SIGTERM)
            while _started(facts["pid"]) == facts["started"]:
                if time.monotonic() > deadline:
                    os.killpg(facts["pid"], signal.SIGKILL)
                time.sleep(0.1)
        return True

    def _command(self, job: Job) -> list[str]:
        folder = self.folder / job.name
        return job.command(self.site, f"--marker={folder / MARKER}", f"--pid-file={folder / PID_FILE}")

    def _facts(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / name / _HOST_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None


def _started(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
