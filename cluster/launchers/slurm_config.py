"""The `slurm` block of a site file."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, model_validator

from cluster.settings.blocks import SiteBlock


class Slurm(SiteBlock):
    """How `vico submit` asks Slurm for nodes. The group in `nodes` says how many and how large."""

    partition: str | None = None
    """Partition (`--partition`); null: Slurm's default."""
    account: str | None = None
    """Account that pays (`--account`); null: the user's default."""
    qos: str | None = None
    """Quality of service (`--qos`); null: the default."""
    time_limit: str | None = Field(None, pattern=r"^(\d+-)?\d+(:\d{2}){0,2}$")
    """Longest duration of the job as Slurm writes it, such as 12:00:00 or 2-00:00:00; null: the partition's.
    A run that needs longer is requeued and resumes."""
    options: list[str] = Field([])
    """More options of sbatch, one per line, such as `--constraint=h100`."""
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
    stop_before_end_s: int = Field(300, ge=30)
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

    @model_validator(mode="after")
    def commands_have_a_place_for_the_host(self) -> Slurm:
        if self.start_on_node and not any("{host}" in word for word in self.start_on_node):
            raise ValueError(
                f"slurm.start_on_node={self.start_on_node} names no node; write {{host}} in its place, such "
                f"as "
                '[ssh, "{host}"]'
            )
        for option in self.options:
            if not re.match(r"^--?[A-Za-z]", option):
                raise ValueError(
                    f"slurm.options: {option!r} is not an option of sbatch; write it as --NAME=VALUE"
                )
        return self
