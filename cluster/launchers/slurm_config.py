"""The `slurm` block of a site file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from cluster.settings.blocks import SiteBlock

_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d{1,2}))?(?::(?P<seconds>\d{1,2}))?"
    r"|(?P<h>\d+):(?P<m>\d{1,2}):(?P<s>\d{1,2})"
    r"|(?P<min>\d+)(?::(?P<sec>\d{1,2}))?)"
)
_EARLY_S = 60
"""Slurm may send the signal before a time limit this much earlier."""
# The path of a socket has at most 107 bytes; Ray appends 66: /session_<date>_<time>_<pid>/sockets/plasma_...
LONGEST_NODE_FOLDER = 107 - 66 - len("/vico-12345678-10/ray")
_IN_JOB = "jobs have their own"
_FIELDS_OF_OPTIONS = {
    **dict.fromkeys(("--partition", "-p"), "set slurm.partition"),
    **dict.fromkeys(("--account", "-A"), "set slurm.account"),
    **dict.fromkeys(("--qos", "-q"), "set slurm.qos"),
    **dict.fromkeys(("--time", "-t"), "set slurm.time_limit"),
    **dict.fromkeys(("--requeue", "--no-requeue"), "set slurm.requeue"),
    "--signal": "set slurm.stop_before_end_s",
    **dict.fromkeys(("--nodes", "-N"), "set the count of the group in nodes"),
    **dict.fromkeys(("--cpus-per-task", "-c"), "set the cpus of the group in nodes"),
    **dict.fromkeys(("--job-name", "-J", "--output", "-o", "--error", "-e", "--open-mode"), _IN_JOB),
    **dict.fromkeys(("--ntasks", "-n", "--ntasks-per-node", "--chdir", "-D"), _IN_JOB),
    **dict.fromkeys(("--array", "-a"), "a run is one job"),
    **dict.fromkeys(("--clusters", "--cluster", "-M"), "submit on a login node of that cluster"),
    **dict.fromkeys(("--wrap", "--wait", "-W", "--parsable", "--test-only"), "vico calls sbatch itself"),
}
"""Options of sbatch that a job has already -> what to do instead."""


class Slurm(SiteBlock):
    """How `vico submit` asks Slurm for nodes. The group in `nodes` says how many and how large."""

    partition: str | None = None
    """Partition (`--partition`); null: Slurm's default."""
    account: str | None = None
    """Account that pays (`--account`); null: the user's default."""
    qos: str | None = None
    """Quality of service (`--qos`); null: the default."""
    time_limit: str | None = None
    """Longest duration of the job as Slurm writes it, such as 12:00:00 or 2-00:00:00; null:
    the partition's. A run that needs longer is requeued and resumes."""
    options: list[str] = Field([])
    """More options of sbatch, one per line, such as `--constraint=h100`; none that jobs have already."""
    setup: list[str] = Field([])
    """Shell lines that prepare the environment on a node, such as `module load cuda` and `source
    /shared/venv/bin/activate`."""
    folder: Path | None = None
    """Folder that all nodes see, for scripts, sources and logs of jobs; null: `jobs` in the storage. Needed
    with an object store."""
    node_folder: Path = Path("/tmp")
    """Folder on each node's own disk, for Ray's sockets and logs. Keep it short: a socket's path has at most
    107 characters."""
    requeue: bool = True
    """Let Slurm start the job again after a node failed or the job was preempted, and let the job requeue
    itself before its time limit. It resumes."""
    stop_before_end_s: int = Field(300, ge=30, le=65535)
    """Seconds before the time limit at which the run publishes a checkpoint and the job is requeued."""
    exclusive: bool = True
    """Take whole nodes. Other jobs on a node would collide with `ray symmetric-run`, which refuses to start
    beside another Ray and stops all Ray processes of the user at its end."""
    interface: str | None = None
    """Network interface for Ray between nodes, such as ib0; null: the address of the node's name."""
    start_timeout_s: int = Field(300, ge=1)
    """Seconds that the first node waits for Ray on all nodes."""
    start_on_node: list[str] = Field([])
    """Command that runs another command on the node `{host}`, for sites where srun does not work, such as
    [ssh, -o, BatchMode=yes, "{host}"]; empty: srun."""

    @field_validator("time_limit", mode="before")
    @classmethod
    def time_limit_is_a_text(cls, limit: Any) -> Any:
        if isinstance(limit, int | float):
            raise ValueError(
                f"slurm.time_limit={limit} is a number, which Slurm takes for minutes; write it as "
                "HOURS:MINUTES:SECONDS, such as 12:00:00"
            )
        return limit

    @model_validator(mode="after")
    def names_are_one_word(self) -> Slurm:
        for field in ("partition", "account", "qos"):
            name = getattr(self, field)
            if name is not None and not re.fullmatch(r"[\w.@+,:/=-]*", name):
                raise ValueError(
                    f"slurm.{field}={name!r} is not a name of Slurm; it has no spaces or special characters"
                )
        return self

    @model_validator(mode="after")
    def time_is_left_before_the_stop(self) -> Slurm:
        if self.time_limit is None:
            return self
        seconds = _seconds(self.time_limit)
        if seconds is None:
            raise ValueError(
                f"slurm.time_limit={self.time_limit!r} is not a time of Slurm; write HOURS:MINUTES:SECONDS "
                'or DAYS-HOURS:MINUTES:SECONDS, such as "12:00:00"'
            )
        if 0 < seconds <= self.stop_before_end_s + _EARLY_S:  # 0: no limit
            raise ValueError(
                f"slurm.time_limit={self.time_limit} ends before a run can work: the job would stop "
                f"{self.stop_before_end_s} s earlier (slurm.stop_before_end_s), up to {_EARLY_S} s too soon, "
                "and requeue itself; raise the limit"
            )
        return self

    @model_validator(mode="after")
    def folders_are_the_same_everywhere(self) -> Slurm:
        for field in ("folder", "node_folder"):
            folder = getattr(self, field)
            if folder is not None and not folder.is_absolute():
                raise ValueError(f"slurm.{field}={folder} is not an absolute path; write it from / on")
        if len(str(self.node_folder).encode(errors="replace")) > LONGEST_NODE_FOLDER:
            raise ValueError(
                f"slurm.node_folder={self.node_folder}: the path is too long for Ray's sockets; give one of "
                f"at most {LONGEST_NODE_FOLDER} bytes, such as /tmp"
            )
        return self

    @model_validator(mode="after")
    def commands_have_a_place_for_the_host(self) -> Slurm:
        if self.start_on_node and not any("{host}" in word for word in self.start_on_node):
            raise ValueError(
                f"slurm.start_on_node={self.start_on_node} names no node; write {{host}} in its place, such "
                f"as "
                '[ssh, "{host}"]'
            )
        for option in self.options:
            match = re.match(r"--[A-Za-z][\w-]*(?=[=\s]|$)|-[A-Za-z]", option)
            if match is None:
                raise ValueError(
                    f"slurm.options: {option!r} is not an option of sbatch; write it as --NAME=VALUE"
                )
            if match[0] in _FIELDS_OF_OPTIONS:
                raise ValueError(
                    f"slurm.options: {option!r} is set by vico; leave it out ({_FIELDS_OF_OPTIONS[match[0]]})"
                )
        return self


def _seconds(limit: str) -> int | None:
    """Return the seconds of a time of Slurm, such as "90" (minutes) or "1-12"; None for any other text."""
    match = _TIME.fullmatch(limit)
    if match is None:
        return None
    part = {name: int(text or 0) for name, text in match.groupdict().items()}
    hours = part["days"] * 24 + part["hours"] + part["h"]
    minutes = part["minutes"] + part["m"] + part["min"]
    return hours * 3600 + minutes * 60 + part["seconds"] + part["s"] + part["sec"]
