"""Secrets planted in the environment, in site files, in errors of libraries and beside the sources are in no
file of a store, of MLflow or of a job, and on no terminal."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from cluster.sources.in_worker import PACKAGES
from tests.integration.demo_pipeline import ROOT, answer, finished, vico, write_pipeline
from tests.integration.tiny_pipeline.project import TRACKED, TinyProject
from tests.waiting import PATIENCE_S, wait_until

VARIABLES = (
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "DB_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "OPENAI_API_KEY",
    "SSH_PRIVATE_KEY",
)


def planted() -> dict[str, str]:
    """Return variable -> a random secret."""
    return {name: secrets.token_hex(12) for name in VARIABLES}


def files_with(folders: list[Path], marks: list[str]) -> list[tuple[str, str]]:
    """Return (file, secret) of every file below the folders that holds one; archives are looked into."""
    held = []
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(paths) > 20
    for path in paths:
        contents = [path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        held += [(str(path), mark) for mark in marks if any(mark.encode() in content for content in contents)]
    return held


def test_what_a_library_quotes_in_an_error_a_log_line_and_on_standard_error(tmp_path):
    project = TinyProject(tmp_path / "project")
    (project.folder / "site.yaml").write_text(TRACKED)
    environment, in_urls = (
        planted(),
        {name: secrets.token_hex(12) for name in ("user", "query", "signed", "header")},
    )
    message = " ".join(
        [
            *environment.values(),
            f"https://me:{in_urls['user']}@host/x",
            f"https://host/x?token={in_urls['query']}&b=1",
            f"s3://b/k?X-Amz-Signature={in_urls['signed']}",
            f"Authorization: Bearer {in_urls['header']}",
        ]
    )
    shown = ""

    def command(name: str, *arguments: str, code: int = 0, **more: str) -> str:
        nonlocal shown
        project.vico(name, *arguments, code=code, **environment, **more)
        shown += project.last_output + project.errors
        return project.last_output

    command("run", code=1, TINY_FAIL="square:1", TINY_MESSAGE=message)
    first = project.runs()[0]
    assert "***" in shown, "the message itself was shown"
    for arguments in (("status",), ("status", first), ("status", first, "--json"), ("plan",)):
        command(*arguments)
    out, err = project.start("logs", first, **environment).communicate(timeout=PATIENCE_S)
    assert "Traceback" in out, "the log has it, and no secrets"
    shown += out + err
    command("run")
    command("run", "--set", "seed=8")
    command("diff", *project.runs())
    command("reproduce", "latest", "--out", str(tmp_path / "reproduced"))
    command("report", first, "--out", str(tmp_path / "report.html"))
    command("audit", "latest")
    project.close()
    marks = [*environment.values(), *in_urls.values()]
    assert [mark for mark in marks if mark in shown] == []
    assert files_with([project.folder, tmp_path], marks) == []


@pytest.fixture
def checkout(tmp_path: Path) -> tuple[Path, list[str]]:
    """A checkout with secrets beside its sources and in git's own files; return it with the secrets."""
    folder = tmp_path / "checkout"
    for name in (*PACKAGES, "tests", "sites"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for name in ("pyproject.toml", "constraints.txt", "vico_command.py"):
        shutil.copy(ROOT / name, folder / name)
    marks = [secrets.token_hex(12) for _ in range(7)]
    names = (
        ".env",
        ".netrc",
        "stages/.env",
        "stages/id_rsa",
        "vico/secrets.json",
        "cluster/.aws/credentials",
        "pipeline/.hidden.py",
    )
    for name, mark in zip(names, marks, strict=False):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"password={mark}\n")
    git = ["git", "-C", str(folder), "-c", "user.name=me", "-c", "user.email=me@host"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run(
        [*git, "add", "vico_command.py", "constraints.txt", *(f"{name}/*.py" for name in PACKAGES)],
        check=True,
    )
    subprocess.run([*git, "reset", "-q", "--", "pipeline/.hidden.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    token = secrets.token_hex(12)
    subprocess.run([*git, "remote", "add", "origin", f"https://me:{token}@host/x.git"], check=True)
    with (folder / "vico" / "settings.py").open("a") as file:
        file.write("# an edit, so that there is a patch\n")
    return folder, [*marks, token]


@pytest.mark.slow
def test_a_job_with_archived_sources(checkout, tmp_path):
    """A submitted run with a real Ray and MLflow; its job brings the sources along."""
    folder, marks = checkout
    pipeline = write_pipeline(tmp_path)
    site = tmp_path / "site.yaml"
    content = {**yaml.safe_load(site.read_text()), "jobs": {"code": "archive"}}
    site.write_text(yaml.safe_dump(content))
    environment = planted()
    options = {"extra_environment": {**environment, "PYTHONPATH": str(folder)}, "cwd": tmp_path}
    submitted = answer("submit", pipeline, "--site", site, "--until", "shard", **options)
    run_file = tmp_path / "runs" / "runs" / submitted["run"] / "run.json"
    wait_until(lambda: json.loads(run_file.read_text())["state"] in ("done", "failed"))
    assert json.loads(run_file.read_text())["state"] == "done", finished(
        vico("logs", "latest", "--site", site)
    )
    packages = [path for path in (tmp_path / "runs" / "jobs").rglob("*") if path.name == "settings.py"]
    assert packages or list((tmp_path / "runs" / "jobs").rglob("*.zip")), "the sources came along"
    assert files_with([tmp_path / "runs"], [*marks, *environment.values()]) == []


def test_a_module_that_is_a_link_out_of_the_checkout_is_not_taken_along(checkout, tmp_path):
    folder, _ = checkout
    (tmp_path / "key.py").write_text("KEY = 'a secret'\n")
    (folder / "stages" / "linked.py").symlink_to(tmp_path / "key.py")
    pipeline = write_pipeline(tmp_path)
    site = tmp_path / "site.yaml"
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "jobs": {"code": "archive"}}))
    options = {"extra_environment": {"PYTHONPATH": str(folder)}, "cwd": tmp_path}
    code, out, err = finished(vico("submit", pipeline, "--site", site, **options))
    assert code == 2 and "stages/linked.py is a link to" in err and err.count("\n") == 1, out + err


def test_secrets_in_a_site_file_are_refused_and_not_repeated(tmp_path):
    pipeline = write_pipeline(tmp_path)
    site = tmp_path / "site.yaml"
    good, mark = yaml.safe_load(site.read_text()), secrets.token_hex(12)
    for change, field in (
        ({"environment": {"HF_TOKEN": mark}}, "environment"),
        ({"environment": {"NCCL_X": f"http://me:{mark}@proxy"}}, "environment.NCCL_X"),
        ({"hook": {"url": f"https://host/x?token={mark}"}}, "hook.url"),
        ({"tracking": {"uri": f"https://host/?api_key={mark}"}}, "tracking.uri"),
    ):
        site.write_text(yaml.safe_dump({**good, **change}))
        code, out, err = finished(vico("submit", pipeline, "--site", site, "--print"))
        assert code == 2 and err.count("\n") == 1, out + err
        assert field in err and mark not in out + err
    for override in (
        f"inputs.model=https://host/x?access_token={mark}",
        f"inputs.model=https://me:{mark}@host/x",
    ):
        code, out, err = finished(vico("plan", pipeline, "--set", override, "--storage", tmp_path / "store"))
        assert code == 2 and "inputs.model" in err and mark not in out + err


CRASH = """
import os, resource, signal, sys
from cluster.sources.in_worker import call_task, code_here, _report
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
{before}
print(resource.getrlimit(resource.RLIMIT_CORE)[0])
"""


@pytest.mark.parametrize("before, limit", [("", None), ("_report()", "0"), ("call_task('x', b'', b'')", "0")])
def test_workers_leave_no_core_files_with_their_environment(before, limit):
    done = subprocess.run(
        [sys.executable, "-c", CRASH.format(before=before)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if limit is not None:
        assert done.stdout.strip() == limit
