"""The command line: what it imports, and its errors for a wrong command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli
from stages.stops import Interrupted
from tests.integration.tiny_pipeline.project import TinyProject
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[3]
PROJECT = ("pipeline", "stages", "cluster", "data_prep", "vico")
LIGHT = {"typer", "click", "rich", "shellingham", "annotated_doc", "typing_extensions", *PROJECT}
COMMAND_NAMES = (
    "init",
    "run",
    "submit",
    "plan",
    "status",
    "logs",
    "cancel",
    "report",
    "audit",
    "diff",
    "reproduce",
    "gc",
    "route",
    "export",
    "serve",
)
HEAVY = ("torch", "transformers", "ray", "mlflow", "deepspeed", "pandas", "sklearn", "skimage", "matplotlib")
# Runs the command line, then writes the heavy libraries that it has imported to standard error.
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


def vico(*arguments, cwd=None, **variables):
    command = [sys.executable, "-c", PROBE, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )


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
        config = ["pipeline.yaml"] if arguments[0] in ("plan", "run") else []
        arguments = [*arguments, *config, "--site", "site.yaml", "--storage", str(done.storage)]
    result = vico(*arguments, cwd=done.folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "HEAVY []"


def test_help_imports_nothing_but_typer_and_a_few_files_of_the_project():
    """The time of `vico --help` is the time of its imports."""
    probe = """
import sys
before = set(sys.modules)  # what the interpreter's own start imports, such as a sitecustomize
sys.argv = ["vico", "--help"]
try:
    from pipeline.cli import main
    main()
finally:
    print(*set(sys.modules) - before, file=sys.stderr)
"""
    command = [sys.executable, "-c", probe]
    modules = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr.split()
    libraries = {name.partition(".")[0] for name in modules if not name.startswith("_")}
    assert "typer" in libraries and libraries - set(sys.stdlib_module_names) <= LIGHT
    assert sum(name.partition(".")[0] in PROJECT for name in modules) < 24


def test_what_deepspeed_says_in_the_driver_goes_to_its_log(tmp_path):
    """Without DS_ACCELERATOR it warns, on standard output, that the driver has no GPU."""
    probe = """
import logging, sys
import pipeline.cli
def command():
    logging.getLogger().addHandler(logging.FileHandler(sys.argv[1]))
    import stages.training.engine
pipeline.cli.app = command
pipeline.cli.main()
"""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", probe, str(tmp_path / "log")]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert result.returncode == 0, result.stderr
    assert "accelerator" not in result.stdout + result.stderr
    assert "Setting accelerator to CPU" in (tmp_path / "log").read_text()


def test_every_command_is_listed():
    help_text = vico("--help").stdout
    for name in ("run", "plan", "status", "logs", "submit", "route", "export"):
        assert f"\n  {name} " in help_text


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
        (["status", "--storage", "pyproject.toml/x"], "pyproject.toml"),
        (["plan", "x" * 300], "File name too long"),
        (["plan", "configs/quickstart.yaml", "--storage", "x" * 300], "File name too long"),
        (["plan", "configs/quickstart.yaml", "--set", f"seed={'[' * 3000}"], "--set"),
        (["init", "x" * 300], "File name too long"),
        (["init", "pyproject.toml/x.yaml"], "pyproject.toml"),
        (["route", "models/small-internvl", "x" * 300, "--threshold", "0.5"], "File name too long"),
    ],
)
def test_a_wrong_command_ends_with_2_and_no_traceback(arguments, message):
    result = vico(*arguments, cwd=ROOT)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


def test_a_locale_that_cannot_name_all_files_is_refused():
    result = vico("status", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "the locale has the encoding ascii" in result.stderr and "PYTHONUTF8=1" in result.stderr


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


def test_a_full_disk_is_reported_and_the_same_command_resumes_the_run(tmp_path):
    project = TinyProject(tmp_path / "project")
    project.vico("run", code=2, TINY_FAIL="square:2", TINY_ERROR="ENOSPC")
    assert project.errors == (
        f"error: square: no space left in storage={project.storage}; "
        "free some space, then give the same command again\n"
    )
    assert json.loads(project.vico("status", "latest", "--json"))["state"] == "failed"
    project.vico("run")


def test_the_version_is_shown():
    assert vico("--version").stdout.startswith("vico 0.")


@pytest.mark.parametrize(
    "words, expected", [("vico sta", ["status"]), ("vico logs 2026", ["20260101-000000-abcd"])]
)
def test_a_shell_completes_commands_and_runs(tmp_path, monkeypatch, words, expected):
    run = tmp_path / "runs" / "runs" / "20260101-000000-abcd"
    run.mkdir(parents=True)
    (run / "run.json").touch()
    monkeypatch.setenv("_VICO_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert vico(cwd=tmp_path).stdout.split() == expected


@pytest.mark.parametrize(
    "arguments",
    [[], ["data"], ["data", "retry"], ["site"], ["site", "check"], *([name] for name in COMMAND_NAMES)],
    ids=str,
)
def test_help_at_80_columns_cuts_nothing(monkeypatch, arguments):
    monkeypatch.setenv("COLUMNS", "80")
    lines = vico(*arguments, "--help").stdout.splitlines()
    assert lines and all(len(line) <= 80 for line in lines)
    assert not any("..." in line for line in lines if not line.startswith("Usage: "))


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_before_a_run_begins_gives_its_exit_code(monkeypatch, name, code):
    def stopped():
        raise Interrupted(name)

    monkeypatch.setattr(cli, "app", stopped)
    monkeypatch.setattr(cli, "filter_standard_streams", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
