"""A real Slurm of two nodes on one machine: controller and nodes are hosts with networks of their own.

Debian's slurmctld, slurmd, slurm-client and munge. There is no accounting, so no sacct.
"""

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hosts import Host, hosts, needs_hosts
from tests.waiting import wait_until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
needs_slurm = [
    needs_hosts,
    pytest.mark.skipif(
        any(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None for name in PROGRAMS),
        reason="needs Slurm: apt install slurmctld slurmd slurm-client munge",
    ),
]
_CONFIG = """\
ClusterName=test
SlurmctldHost=login
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmUser=root
StateSaveLocation={folder}/state
SwitchType=switch/none
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=600
NodeName=n1,n2 CPUs=2 RealMemory=6000 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, Host]]:
    """Yield the hosts `login`, `n1` and `n2`. Commands of Slurm work on all of them: SLURM_CONF is set here.

    `folder` must have a short path: Slurm's sockets are in it.
    """
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    config = folder / "slurm.conf"
    config.write_text(_CONFIG.format(folder=folder))
    with hosts(["login", "n1", "n2"], folder) as machines, _munged(folder):
        os.environ["SLURM_CONF"] = str(config)
        try:
            machines["login"].start("/usr/sbin/slurmctld", "-D", "-f", config, stderr=subprocess.DEVNULL)
            for node in ("n1", "n2"):
                machines[node].start(
                    "/usr/sbin/slurmd", "-D", "-f", config, "-N", node, stderr=subprocess.DEVNULL
                )
            wait_until(
                lambda: machines["login"].run("sinfo", "-h", "-o", "%T %D").stdout.strip() == "idle 2",
                pause_s=0.3,
                or_else=lambda: (folder / "slurmctld.log").read_text()[-3000:],
            )
            yield machines
        finally:
            os.environ.pop("SLURM_CONF")


@contextmanager
def _munged(folder: Path) -> Iterator[None]:
    """Provide an authentication daemon with a key of its own; all hosts reach it by its socket."""
    munge = pwd.getpwnam("munge")
    own = folder / "munge"
    own.mkdir(mode=0o700)
    (own / "key").write_bytes(os.urandom(128))
    (own / "key").chmod(0o400)
    for path in (own, own / "key"):
        os.chown(path, munge.pw_uid, munge.pw_gid)
    command = ["/usr/sbin/munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    command += [f"--{name}={own}/{name.split('-')[0]}" for name in ("key-file", "pid-file", "seed-file")]
    # munged locks and writes beside its socket
    folder.chmod(0o1777)
    with (folder / "munged.log").open("w") as log:
        daemon = subprocess.Popen(command, user="munge", group="munge", stdout=log, stderr=log)
    try:
        wait_until(
            (folder / "munge.socket").exists, daemon, or_else=lambda: (folder / "munged.log").read_text()
        )
        yield
    finally:
        daemon.terminate()
        daemon.wait()
