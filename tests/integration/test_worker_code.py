"""Workers run the driver's code, wherever the command is given: from a wheel and from a checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.sources.in_worker import PACKAGES
from tests.installed_wheel import copy_packages, install_wheel, without_checkout
from tests.integration.demo_pipeline import write_pipeline
from tests.ports import free_port
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
PLANTED = "raise RuntimeError('code of the working directory')\n"


@pytest.fixture(scope="module")
def other_checkout(tmp_path_factory) -> Path:
    """A checkout whose workers would fail, also in files that only workers import."""
    folder = copy_packages(tmp_path_factory.mktemp("other"))
    for name in ("stages/shard/tasks.py", "stages/consistency/worker.py"):
        path = folder / name
        path.write_text(path.read_text().replace("\nimport ", f"\n{PLANTED}import ", 1))
        assert PLANTED in path.read_text()
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The command `vico` of a wheel, in an environment that has the dependencies of this one."""
    return install_wheel(tmp_path_factory.mktemp("wheel"))


def vico(program: Path, *arguments: object, cwd: Path, **variables: str) -> tuple[int, str]:
    """Run the program `vico` in `cwd`; return its exit code and standard error."""
    process = subprocess.run(
        [str(program), *map(str, arguments)],
        cwd=cwd,
        env=without_checkout(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    return process.returncode, process.stderr


def run_until(stage: str, program: Path, folder: Path, cwd: Path, **variables: str) -> tuple[int, str]:
    config = write_pipeline(folder)
    arguments = ("run", config, "--site", folder / "site.yaml", "--until", stage)
    return vico(program, *arguments, cwd=cwd, **variables)


def assert_workers_ran_the_drivers_code(storage: Path, stage: str, place: Path, kinds: int) -> None:
    """Check record and reports of a stage on which at least `kinds` processes worked."""
    (record,) = (storage / stage).glob("*/record.json")
    code = json.loads(record.read_text())["facts"]["code"]
    assert list(code["workers"]) == [code["driver"]]
    assert code["workers"][code["driver"]] >= kinds
    reports = [json.loads(line) for line in (record.parent / "attempts/1/workers.ndjson").open()]
    assert {report["digest"] for report in reports} == {code["driver"]}
    folders = {package["folder"] for report in reports for package in report["packages"].values()}
    assert folders == {str(place)}
    assert "is damaged" not in next(storage.glob("runs/*/driver.log")).read_text()


@pytest.mark.slow
def test_a_wheel_started_inside_another_checkout_runs_its_own_code(installed, other_checkout, tmp_path):
    code, errors = run_until("consistency", installed, tmp_path, other_checkout)
    assert code == 0, errors[-3000:]
    place = Path(sysconfig.get_path("purelib", vars={"base": str(installed.parents[1])}))
    assert_workers_ran_the_drivers_code(tmp_path / "runs", "shard", place, kinds=1)
    # two ranks and Ray Train's controller
    assert_workers_ran_the_drivers_code(tmp_path / "runs", "consistency", place, kinds=3)


@pytest.mark.slow
def test_a_checkout_started_beside_modules_of_the_same_names_runs_its_own_code(installed, tmp_path):
    """`queue` and `simplejpeg` are imported by workers only, late or early; an empty entry of PYTHONPATH is
    the working directory."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    for name in ("stages", "pipeline", "simplejpeg", "tokenizers"):
        (folder / f"{name}.py").write_text(PLANTED)
    code, errors = run_until("shard", installed, tmp_path, folder, PYTHONPATH=str(ROOT))
    assert code == 0, errors[-3000:]
    assert_workers_ran_the_drivers_code(tmp_path / "runs", "shard", ROOT, kinds=1)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("is_folder", [True, False])
def test_packages_of_several_places_are_refused(installed, tmp_path, package, is_folder):
    foreign = tmp_path / "foreign"
    path = foreign / package / "__init__.py" if is_folder else foreign / f"{package}.py"
    path.parent.mkdir(parents=True)
    path.write_text("")
    code, errors = vico(installed, "--help", cwd=tmp_path, PYTHONPATH=str(foreign))
    assert (code, errors.count("\n")) == (2, 1), errors
    other = "vico_command" if package == "pipeline" else "pipeline"
    assert errors.startswith(f"error: {package} comes from {path}, and {other} from ")


@pytest.fixture
def foreign_cluster(other_checkout) -> Iterator[str]:
    """A cluster whose processes were started with the other checkout on their path."""
    with tempfile.TemporaryDirectory(prefix="v-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        port = free_port()
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
        command += [f"--port={port}", f"--temp-dir={folder}", "--disable-usage-stats"]
        command += ["--include-dashboard=false"]
        environment = {**os.environ, "PYTHONPATH": str(other_checkout), **TOKEN}
        head = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert any("Ray runtime started" in line for line in head.stdout)
        yield f"127.0.0.1:{port}"
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        head.wait()


def test_a_cluster_with_other_code_is_refused_before_any_work(
    installed, foreign_cluster, other_checkout, tmp_path
):
    code, errors = run_until("shard", installed, tmp_path, tmp_path, RAY_ADDRESS=foreign_cluster)
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "the cluster refuses our token; give its token in RAY_AUTH_TOKEN" in line
    variables = {"RAY_ADDRESS": foreign_cluster, **TOKEN}
    code, errors = run_until("shard", installed, tmp_path, tmp_path, **variables)
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert "imports other code than this command: stages from " in line
    assert f"stages from {other_checkout}, here from " in line
    assert not list((tmp_path / "runs" / "shard").glob("*/attempts"))


@pytest.mark.slow
def test_code_edited_during_a_session_is_refused_by_tasks_actors_and_ranks(tmp_path):
    checkout = copy_packages(tmp_path / "checkout")
    code = """
        import sys
        from pathlib import Path
        from cluster.ray_session import ray_session
        from cluster.site import Site
        from cluster.tasks import actor_pool, map_tasks
        from stages.parts import Parts
        from stages.training.ranks.workers import run_workers
        from vico.errors import UserError

        class Context:
            stage, parts, site = "s", Parts(Path.cwd() / "stage", 1), Site()
            note = progress = check = lambda *arguments: None

        def refused(start):
            try:
                start()
            except UserError as error:
                print(str(error).count("\\n"), error)
            else:
                print("worked")

        tasks = lambda: list(map_tasks(abs, [1], site=Context.site))
        actors = lambda: list(actor_pool(dict, (), ["key"], "get", site=Context.site))
        ranks = lambda: run_workers(print, 0, Context, num_steps=1)
        with ray_session(Context.site):
            for start in (tasks, actors):
                refused(start)
            with open(sys.argv[1], "a") as file:
                file.write("# edited\\n")
            for start in (tasks, actors, ranks):
                refused(start)
    """
    edited = checkout / "vico" / "losses.py"
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code), str(edited)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    *worked, task, actor, rank = process.stdout.splitlines()
    assert worked == ["worked", "worked"]
    for line in (task, actor, rank):
        assert line.startswith("0 a worker on ")
        assert f"imports other code than this command: vico from {checkout}, here from {checkout}; " in line


def test_a_job_that_imports_other_code_than_was_submitted_is_refused(installed, tmp_path):
    submission = {"kind": "ray-jobs", "address": "http://127.0.0.1:1", "id": "vico-job", "code": "0" * 64}
    code, errors = run_until("shard", installed, tmp_path, tmp_path, VICO_JOB=json.dumps(submission))
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.startswith("error: job vico-job imports its code from ")
    assert not (tmp_path / "runs").exists()
