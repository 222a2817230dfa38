"""What the command line costs, and what it says when something is wrong with the command itself."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.tiny_pipeline.project import TinyProject

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "ray", "mlflow", "deepspeed", "pandas", "sklearn", "skimage", "matplotlib")
# the command line, then on standard error the heavy modules it has imported
PROBE = f"""
import sys
sys.argv[0] = "vico"
try:
    from pipeline.cli import main
    if "--tiny" in sys.argv:
        sys.argv.remove("--tiny")
        import pipeline.config.graph
        from tests.integration.tiny_pipeline.command import tiny_graph
        graph = tiny_graph()
        pipeline.config.graph.pipeline_graph = lambda: graph
    main()
finally:
    print("HEAVY", sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
"""


def vico(*arguments, cwd=None):
    command = [sys.executable, "-c", PROBE, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    project = TinyProject(tmp_path_factory.mktemp("light"))
    project.vico("run")
    return project


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["plan", "--tiny"],
        ["run", "--tiny"],
        ["status"],
        ["status", "latest"],
        ["audit", "latest"],
        ["diff", "latest", "latest"],
        ["gc", "--dry-run"],
    ],
)
def test_reading_commands_and_a_reused_run_import_nothing_heavy(done, arguments):
    if "--help" not in arguments:
        given = ["pipeline.yaml"] if arguments[0] in ("plan", "run") else []
        arguments = [*arguments, *given, "--site", "site.yaml", "--storage", str(done.storage)]
    result = vico(*arguments, cwd=done.folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "HEAVY []"


def test_help_comes_at_once():
    """By CPU time, so that a busy machine fails nothing; the command has one thread and waits for nothing."""

    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "--help"], cwd=ROOT, check=True, capture_output=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.5


def test_every_command_is_listed():
    listed = vico("--help").stdout
    for name in ("run", "plan", "status", "logs", "submit", "route", "export"):
        assert f"\n  {name} " in listed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["rum"], "No such command 'rum'"),
        (["run"], "Missing argument 'CONFIG'"),
        (["run", "x.yaml", "--forced", "shard"], "No such option: --forced"),
        (["run", "x.yaml", "--wait", "long"], "Invalid value for '--wait'"),
        (["run", "x.yaml"], "config file x.yaml does not exist"),
        (["plan", "x.yaml", "--site", "nowhere"], "nowhere"),
        (["status", "--storage", "pyproject.toml"], "is a file; name a folder with --storage"),
    ],
)
def test_a_wrong_command_ends_with_2_and_no_traceback(arguments, message):
    result = vico(*arguments, cwd=ROOT)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="a small disk needs root to mount")
def test_too_little_disk_is_refused_before_anything_starts(tmp_path):
    project = TinyProject(tmp_path / "project")
    project.storage.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(project.storage)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        project.vico("run", code=2)
        assert project.errors == (
            f"error: storage={project.storage} has 16 MiB free, this run needs at least 192 MiB; "
            "free some space or choose another folder with --storage\n"
        )
        assert list(project.storage.iterdir()) == []
    finally:
        subprocess.run(["umount", str(project.storage)], check=True)


def test_a_disk_that_fills_up_is_told_and_the_run_goes_on_later(tmp_path):
    project = TinyProject(tmp_path / "project")
    project.vico("run", code=2, TINY_FAIL="square:2", TINY_ERROR="ENOSPC")
    assert project.errors == (
        f"error: square: no space left in storage={project.storage}; free some, then the same command\n"
    )
    assert json.loads(project.vico("status", "latest", "--json"))["state"] == "failed"
    project.vico("run")
