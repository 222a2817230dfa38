"""Kind `slurm`: batch jobs, through sbatch, squeue, sacct and scancel."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from contextlib import suppress
from typing import ClassVar

from cluster.launchers.launcher import Job, JobState, JobStatus
from cluster.launchers.sbatch import BATCH_SCRIPT, NODE_SCRIPT, batch_script, node_script
from cluster.launchers.shared_folder import DRIVER_LOG, FolderJobs, end_of_job, last_lines, write_job_folder
from vico.errors import UserError, one_line

_ANSWER_TIMEOUT_S = 60
_STOP_TIMEOUT_S = 300.0
_WAITING = ("PENDING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_WORKING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING")
_NO_REASON = ("", "None")


class SlurmJobs(FolderJobs):
    """The Slurm whose commands are on PATH. Files of jobs are in `folder`, which all nodes see.

    A job is found by its name, which is unique, so that it can be reached before and after it has a number.
    """

    kind: ClassVar[str] = "slurm"

    def check(self) -> None:
        """Raise UserError if a command of Slurm is missing, or its controller does not answer."""
        for command in ("sbatch", "squeue", "scancel"):
            if shutil.which(command) is None:
                raise UserError(
                    f"site {self.site.name}: {command} is not on PATH; submit from a login node of the Slurm "
                    "cluster, or choose a site of another kind"
                )
        answer = _call(["squeue", "--noheader", f"--name=vico-{os.getpid()}"])
        if answer.returncode:
            raise UserError(
                f"site {self.site.name}: Slurm's controller does not answer ({one_line(answer.stderr)}); try "
                "`sinfo` here, and later again"
            )

    def render(self, job: Job) -> str:
        folder = self.folder / job.name
        files = {**self._scripts(job), **job.files}
        parts = [f"# {folder / name}\n{text.rstrip()}" for name, text in files.items()]
        return "\n\n".join([f"# sbatch {shlex.quote(str(folder / BATCH_SCRIPT))}", *parts])

    def submit(self, job: Job) -> str:
        folder = self.folder / job.name
        scripts = self._scripts(job)
        write_job_folder(folder, job, with_sources=self.site.jobs.code == "archive")
        for name, text in scripts.items():
            (folder / name).write_text(text, encoding="utf-8")
        script = folder / BATCH_SCRIPT
        try:
            answer = _call(["sbatch", "--parsable", str(script)])
        except BaseException:
            _remove(job.name)
            raise
        if answer.returncode:
            _remove(job.name)
            raise UserError(
                f"site {self.site.name}: sbatch refuses the job ({one_line(answer.stderr)}); correct the "
                f"slurm block of the site; the script is {script}"
            )
        return f"to Slurm as job {answer.stdout.strip()}"

    def status(self, name: str) -> JobStatus:
        try:
            # Without --states=all, squeue hides jobs that ended a moment ago.
            queue = ["squeue", "--noheader", "--states=all", f"--name={name}", "--format=%i|%T|%r"]
            answer = _call(queue)
        except UserError as error:
            return self._unanswered(name, str(error))
        if answer.returncode:
            return self._unanswered(name, f"Slurm does not answer: {one_line(answer.stderr)}")
        lines = answer.stdout.split("\n")
        if lines[0]:
            number, state, reason = lines[0].split("|", 2)
            return self._status(name, number, state.strip(), reason.strip())
        return self._ended_status(name)

    def logs(self, name: str) -> str:
        return last_lines(self.folder / name / DRIVER_LOG)

    def cancel(self, name: str) -> bool:
        """Let a working driver publish a checkpoint and end; then remove the job from Slurm."""
        state = self.status(name).state
        if state not in ("pending", "running"):
            return False
        if state == "running":
            _call(["scancel", "--batch", "--signal=TERM", f"--name={name}"])
            deadline = time.monotonic() + _STOP_TIMEOUT_S
            while self.status(name).state == "running" and time.monotonic() < deadline:
                time.sleep(1)
        answer = _call(["scancel", f"--name={name}"])
        if answer.returncode:
            raise UserError(f"RUN: Slurm does not cancel job {name}: {one_line(answer.stderr)}; try again")
        return True

    def _scripts(self, job: Job) -> dict[str, str]:
        folder = self.folder / job.name
        return {
            BATCH_SCRIPT: batch_script(job, self.site, folder),
            NODE_SCRIPT: node_script(job, self.site, folder),
        }

    def _status(self, name: str, number: str, state: str, reason: str) -> JobStatus:
        """Return the status for a state of Slurm, such as "PENDING" with the reason "Resources"."""
        shown = f"job {number} is {state}" + ("" if reason in _NO_REASON else f" ({reason})")
        if state in _WAITING:
            return JobStatus("pending", shown)
        if state in _WORKING:
            return JobStatus("running", shown)
        if state.startswith("CANCELLED"):
            return JobStatus("cancelled", shown)
        ended = end_of_job(self.folder / name)
        if ended is not None:
            return JobStatus(ended.state, f"{shown}; {ended.message}" if ended.message else shown)
        job_state: JobState = "done" if state == "COMPLETED" else "failed"
        return JobStatus(job_state, f"{shown}; see {self.folder / name / DRIVER_LOG}")

    def _unanswered(self, name: str, reason: str) -> JobStatus:
        """Return the status while Slurm says nothing: a job whose driver was stopped may wait to start
        again."""
        ended = end_of_job(self.folder / name)
        return JobStatus("unknown", reason) if ended is None or ended.state == "cancelled" else ended

    def _ended_status(self, name: str) -> JobStatus:
        """Return the status of a job that Slurm's queue has forgotten: by the accounting, else the marker."""
        problem = "sacct is not on PATH"
        if shutil.which("sacct") is not None:
            command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--name={name}"]
            answer = _call([*command, "--starttime=now-90days", "--format=JobID,State,Reason"])
            if answer.returncode == 0 and answer.stdout.strip():
                number, state, reason = answer.stdout.strip().split("\n")[-1].split("|", 2)
                return self._status(name, number, state.partition(" ")[0], reason)
            problem = one_line(answer.stderr) or "the accounting does not know it"
        ended = end_of_job(self.folder / name)
        return ended or JobStatus("unknown", f"Slurm's queue does not know job {name} any more ({problem})")


def _remove(name: str) -> None:
    """Remove a job that sbatch may have submitted although it failed, as after a timeout."""
    with suppress(UserError):
        _call(["scancel", f"--name={name}"])


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm; raises UserError if it is missing or hangs."""
    environment = {
        name: text for name, text in os.environ.items() if not name.startswith(("SBATCH_", "SLURM_"))
    }
    environment |= {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_TIMEOUT_S, env=environment, check=False
        )
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not on PATH; use a login node of the Slurm cluster") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{command[0]} gave no answer within {_ANSWER_TIMEOUT_S} s; Slurm may be overloaded, try again"
        ) from error
