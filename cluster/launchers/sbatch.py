"""The two scripts of a Slurm job: one for sbatch, and one that every node runs.

The job starts Ray on all its nodes with `ray symmetric-run`. Its traps (Ray 2.60), and what is done:

- It waits 30 s for the nodes: `RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT` is set from the site.
- It finds the head by comparing addresses, and on many systems a node's own name is 127.0.1.1: the scripts
  pass an address of an interface.
- It refuses to start beside another Ray, and ends with a `ray stop` for all of the user's Rays: jobs are
  `--exclusive`.
- It exits with 0 when `ray start` failed: success is the marker that the driver's process writes.
- It looks at RAY_ADDRESS of the environment that sbatch passes on: the scripts unset it.
- SIGTERM kills it without a word to the driver: the batch script signals the driver itself.
- It looks for the cluster in Ray's default folder: `RAY_TMPDIR` moves that, and not `--temp-dir`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from cluster.launchers.launcher import Job
from cluster.launchers.shared_folder import DRIVER_LOG, MARKER, PID_FILE
from cluster.site import Site
from vico.errors import UserError

BATCH_SCRIPT, NODE_SCRIPT = "job.sh", "node.sh"


def batch_script(job: Job, site: Site, folder: Path) -> str:
    """Return the script for sbatch; `folder` is the job's, seen by all nodes."""
    directives = "\n".join(f"#SBATCH {option}" for option in _options(job, site, folder))
    return _BATCH.format(
        directives=directives,
        folder=shlex.quote(str(folder)),
        setup=_setup(site),
        interface=shlex.quote(site.slurm.interface or ""),
        on_nodes=_on_nodes(site, folder),
        requeue="1" if site.slurm.requeue else "",
        marker=MARKER,
        pid_file=PID_FILE,
    )


def node_script(job: Job, site: Site, folder: Path) -> str:
    """Return the script that every node runs."""
    group = site.nodes[0]
    exports = [
        f"export {name}={shlex.quote(text)}"
        for name, text in {**site.environment, **job.environment()}.items()
    ]
    resources = shlex.quote(f'{{"{group.resource}": 1}}')
    driver = job.command(site, f"--marker={folder / MARKER}", f"--pid-file={folder / PID_FILE}")
    return _NODE.format(
        folder=shlex.quote(str(folder)),
        setup=_setup(site),
        exports="\n".join(exports),
        node_folder=shlex.quote(str(site.slurm.node_folder)),
        timeout=site.slurm.start_timeout_s,
        python=shlex.quote(site.jobs.python),
        start=f"--num-cpus={group.cpus} --num-gpus={group.gpus} --resources={resources}",
        driver=shlex.join(driver),
        marker=MARKER,
    )


def _options(job: Job, site: Site, folder: Path) -> list[str]:
    slurm, group = site.slurm, site.nodes[0]
    named = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time_limit,
        "gpus-per-node": group.gpus or None,
        "mem": f"{group.memory_gib * 1024:.0f}M" if group.memory_gib is not None else None,
    }
    return [
        f"--job-name={job.name}",
        f"--nodes={group.count}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={group.cpus}",
        *(f"--{name}={value}" for name, value in named.items() if value is not None),
        *(["--exclusive"] if slurm.exclusive else []),
        "--requeue" if slurm.requeue else "--no-requeue",
        f"--signal=B:USR1@{slurm.stop_before_end_s}",
        "--open-mode=append",
        f"--output={shlex.quote(str(folder / DRIVER_LOG).replace('%', '%%'))}",
        *map(_one_word, slurm.options),
    ]


def _one_word(option: str) -> str:
    """Return an option with quotes around a value that sbatch would split; one with quotes stays as it is."""
    name, equals, value = option.partition("=")
    if not re.search(r"[\s#]", value) or re.search(r"['\"\\]", value):
        return option
    return f"{name}{equals}{shlex.quote(value)}"


def _setup(site: Site) -> str:
    """Return the lines of the site. Scripts of systems and of conda read variables that are not set."""
    return "\n".join(["set +u", *site.slurm.setup, "set -u"]) if site.slurm.setup else ":"


def _on_nodes(site: Site, folder: Path) -> str:
    """Return the shell lines that run node.sh on every node in the background.

    Raises UserError if the shell that ssh starts would split the folder's name.
    """
    if not site.slurm.start_on_node:
        return (
            'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \\\n'
            # Since Slurm 22.05, srun does not take this from sbatch: Ray and all ranks could get one CPU.
            '    --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \\\n'
            f'    bash "$folder/{NODE_SCRIPT}" &\n'
            "steps=$!"
        )
    if shlex.quote(str(folder)) != str(folder):
        raise UserError(
            f"slurm.start_on_node: a shell on the node would split the path {folder}; set slurm.folder (or "
            "storage) to one without spaces and special characters"
        )
    words = " ".join(_word(word) for word in site.slurm.start_on_node)
    return f'for host in $hosts; do\n    {words} bash "$folder/{NODE_SCRIPT}" &\n    steps="$steps $!"\ndone'


def _word(word: str) -> str:
    return '"$host"'.join(shlex.quote(part) if part else "" for part in word.split("{host}"))


_BATCH = """\
#!/bin/bash
{directives}
# Written by `vico submit`. The marker {marker} is written last and holds the driver's exit code.
set -uo pipefail
folder={folder}
cd "$folder" || exit 1
{setup}

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit 1
interface={interface}
if [ -n "$interface" ]; then
    head=$(ip -o -4 addr show dev "$interface" | awk '{{sub("/.*", "", $4); print $4; exit}}')
else
    head=$(hostname -I | awk '{{print $1}}')
fi
[ -n "$head" ] || {{ echo "this node has no IPv4 address${{interface:+ on $interface}}"; exit 1; }}

# Node.sh reads this. The token keeps other users of the network out of this Ray.
token=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n')
(umask 077; cat > job.env <<END
export VICO_HEAD=$head:$((20000 + SLURM_JOB_ID % 12000)) VICO_NODES=$SLURM_JOB_NUM_NODES
export VICO_JOB_ID=$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$token
END
)
rm -f {marker} {pid_file}
echo "$(date '+%F %T') job $SLURM_JOB_ID, start ${{SLURM_RESTART_COUNT:-0}}: head $head, nodes" $hosts

# USR1 comes from Slurm before the time limit, TERM from `vico cancel`. Both let the driver publish a
# checkpoint first; after USR1 the job is requeued and resumes. Without a driver, Ray's start is stopped.
again= steps=
stop() {{
    echo "$(date '+%F %T') $1: the driver is stopped"
    [ -n "$steps" ] || exit 143
    {{ [ -s {pid_file} ] && kill -TERM "$(cat {pid_file})" 2> /dev/null; }} || kill $steps
}}
trap 'again={requeue}; stop USR1' USR1
trap 'stop TERM' TERM

{on_nodes}
for step in $steps; do
    while kill -0 "$step" 2> /dev/null; do wait "$step"; done
done

if [ ! -s {marker} ]; then
    echo "the driver wrote no {marker}: Ray did not start on all nodes, or the driver was killed; see above"
    exit 1
fi
code=$(tr -dc 0-9 < {marker})
if [ -n "$again" ] && [ "$code" = 143 ]; then
    echo "$(date '+%F %T') requeued; the run resumes from its checkpoint"
    mv {marker} {marker}.requeued  # the job has not ended
    scontrol requeue "$SLURM_JOB_ID" || mv {marker}.requeued {marker}
fi
exit "$code"
"""
_NODE = """\
#!/bin/bash
# Runs on every node of the job; started by job.sh.
set -u
folder={folder}
cd "$folder" || exit 1
{setup}
unset RAY_ADDRESS
. ./job.env || exit 1
{exports}
python=$(command -v {python}) || {{
    echo "$(hostname): there is no {python}; correct jobs.python, or slurm.setup"
    exit 1
}}
export PATH=$(dirname "$python"):$PATH  # symmetric-run calls `ray` by name
export RAY_TMPDIR={node_folder}/vico-$VICO_JOB_ID
mkdir -p "$RAY_TMPDIR" || exit 1
# Ray ends if its agents do not start within 15 s. Their code is read once before, because that alone can take
# longer from a shared folder that many nodes read at the same time.
"$python" -c 'import ray.dashboard.agent, ray._private.runtime_env.agent.runtime_env_agent' || :
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT={timeout} RAY_raylet_start_wait_time_s={timeout}
ray symmetric-run --address "$VICO_HEAD" --min-nodes "$VICO_NODES" \\
    {start} \\
    -- env RAY_ADDRESS="$VICO_HEAD" {driver}
code=$?
# Ray's logs stay on the node after a failure. Symmetric-run says 0 also if Ray did not start here.
grep -qs '"exit_code": 0[,}}]' {marker} && rm -rf "$RAY_TMPDIR"
exit "$code"
"""
