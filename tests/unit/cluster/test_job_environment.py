"""Values of `environment` reach the driver as they are written in the site, whatever characters they have.

The scripts of a Slurm job run in bash, with small programs for Slurm's commands and for Ray.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.launchers.launcher import Job
from cluster.launchers.local import LocalJobs
from cluster.launchers.ray_jobs import RayJobs
from cluster.launchers.rayjob import ray_job
from cluster.launchers.shared_folder import DRIVER_LOG, MARKER
from cluster.launchers.slurm import SlurmJobs
from cluster.site import Site
from tests.waiting import PATIENCE_S
from vico.errors import UserError

ODD = {
    "ODD_WORDS": "two  words ",
    "ODD_QUOTES": 'it\'s "quoted" \\ `id`',
    "ODD_DOLLARS": "$HOME $(id) $$ ${X}",
    "ODD_LINES": "first\nsecond\tEND\n",
    "ODD_LETTERS": "naïve 日本 🙂",
    "ODD_NOTHING": "",
}
JOB = Job("vico-x", ("run", "c.yaml", "--until", "two words"), {"c.yaml": "seed: 0\n"}, {"id": "it's x"})
FOLDER = "it's a folder, 100% $HOME"


def odd_variables(environment: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in environment.items() if name.startswith("ODD_")}


@pytest.fixture
def program(tmp_path) -> Callable[[str, str], Path]:
    """Return a function that writes an executable bash program."""

    def write(name: str, script: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        return path

    return write


def run_slurm_job(tmp_path: Path, program: Callable[[str, str], Path], ray: str) -> tuple[int, str, Path]:
    """Submit JOB to a Slurm whose sbatch runs the script here; return (exit code, its output, its folder)."""
    python = program("python", f'exec {sys.executable} "$@"')
    program("ray", ray)
    program("scontrol", "echo n1")
    program("srun", 'while [ "$1" != bash ]; do shift; done; exec "$@"')
    program("sbatch", "echo 7")
    site = Site(
        kind="slurm",
        nodes=[{"name": "gpu", "cpus": 2}],
        environment=ODD,
        jobs={"python": str(python)},
        slurm={"setup": ["export SET_UP=1"], "options": ["--comment=two words", "-C 'a b'", "--x=1"]},
    )
    jobs = SlurmJobs(tmp_path / FOLDER, site)
    path = f"{python.parent}:{os.environ['PATH']}"
    os.environ["PATH"], before = path, os.environ["PATH"]
    try:
        jobs.submit(JOB)
    finally:
        os.environ["PATH"] = before
    folder = tmp_path / FOLDER / JOB.name
    environment = {
        **{name: text for name, text in os.environ.items() if name != "PYTHONPATH"},
        "PATH": path,
        "RAY_ADDRESS": "elsewhere:1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
    }
    command = ["bash", str(folder / "job.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    return done.returncode, done.stdout + done.stderr, folder


def test_the_driver_of_a_slurm_job_gets_them(tmp_path, program):
    # Ray's symmetric-run executes what is after -- on the first node; the driver here is a small program.
    ray = f"""\
echo "RAY_ADDRESS=${{RAY_ADDRESS-}}" > "{tmp_path}/ray.txt"
while [ "$1" != -- ]; do shift; done; shift
printf '%s\\0' "$@" > "{tmp_path}/words.txt"
env -0 > "{tmp_path}/env.txt"
echo '{{"exit_code": 0}}' > ended.json"""
    code, output, folder = run_slurm_job(tmp_path, program, ray)
    assert code == 0, output
    environment = dict(line.split("=", 1) for line in (tmp_path / "env.txt").read_text().split("\0") if line)
    assert odd_variables(environment) == ODD
    assert environment["SET_UP"] == "1"
    assert json.loads(environment["VICO_JOB"]) == JOB.submission
    assert (tmp_path / "ray.txt").read_text() == "RAY_ADDRESS=\n", "of the login node's environment"
    words = (tmp_path / "words.txt").read_text().split("\0")[:-1]
    assert words[-4:] == list(JOB.arguments)
    assert f"--marker={folder / MARKER}" in words
    script = (folder / "job.sh").read_text()
    options = [
        word for line in re.findall("^#SBATCH (.*)$", script, re.MULTILINE) for word in shlex.split(line)
    ]
    assert options[-4:] == ["--comment=two words", "-C", "a b", "--x=1"]
    (directive,) = re.findall(r"^#SBATCH (--output=.*)$", (folder / "job.sh").read_text(), re.MULTILINE)
    assert shlex.split(directive) == [f"--output={str(folder / DRIVER_LOG).replace('%', '%%')}"]


def test_a_stop_while_ray_starts_ends_a_slurm_job_at_once(tmp_path, program):
    """No driver is there to be told; without its end, `vico cancel` would wait for minutes."""
    pid = tmp_path / "ray.pid"
    job = "$(ps -o ppid= $PPID)"
    ray = f'echo $$ > "{pid}"; kill -TERM {job}; exec sleep 600 > /dev/null 2>&1'
    try:
        code, output, _ = run_slurm_job(tmp_path, program, ray)
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert code == 1 and "TERM: the driver is stopped" in output, output
    assert "the driver wrote no ended.json" in output


def test_a_folder_that_ssh_would_split_is_refused_before_anything_is_written(tmp_path):
    group = {"name": "gpu", "cpus": 2}
    site = Site(kind="slurm", nodes=[group], slurm={"start_on_node": ["ssh", "{host}"]})
    with pytest.raises(UserError, match=r"slurm\.start_on_node: .* would split the path .*set slurm\.folder"):
        SlurmJobs(tmp_path / FOLDER, site).submit(JOB)
    assert not (tmp_path / FOLDER).exists()


def test_the_driver_of_a_background_job_gets_them(tmp_path):
    """By the commands that --print shows."""
    (tmp_path / FOLDER / JOB.name).mkdir(parents=True)
    text = LocalJobs(tmp_path / FOLDER, Site(environment=ODD)).render(JOB).split("\n\n# ")[0]
    commands, nohup, _ = text.partition("nohup ")
    assert nohup
    done = subprocess.run(["bash", "-c", f"{commands}pwd; env -0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = dict(line.split("=", 1) for line in done.stdout.partition("\n")[2].split("\0") if line)
    assert odd_variables(environment) == ODD


def test_the_driver_of_a_ray_job_gets_them():
    site = Site(kind="ray", environment=ODD, jobs={"address": "http://h:8265"})
    entrypoint = RayJobs("http://h:8265", site)._entrypoint(JOB)  # Ray hands it to a shell
    shown = entrypoint.replace(f"{site.jobs.python} -m cluster.launchers.driver_process", "env -0; true", 1)
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True)
    environment = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
    assert odd_variables(environment) == ODD


def as_kubernetes_reads(text: str) -> str:
    """Return the value of a variable in a pod, where $$ is $ and no other variable is known."""
    return re.sub(r"\$\$", "$", text)


def test_the_pods_of_a_ray_job_get_them():
    group = {"name": "gpu", "cpus": 2, "memory_gib": 8}
    manifest = ray_job(JOB, Site(kind="kuberay", nodes=[group], environment=ODD, kuberay={"image": "i"}))
    cluster = manifest["spec"]["rayClusterSpec"]
    for part in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = part["template"]["spec"]["containers"]
        variables = {entry["name"]: as_kubernetes_reads(entry["value"]) for entry in container["env"]}
        assert odd_variables(variables) == ODD
        assert not re.search(r"(?<!\$)(\$\$)*\$\(", container["env"][2]["value"]), "another variable"
