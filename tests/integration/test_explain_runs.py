"""`vico diff` and `vico reproduce`: real commands over tiny stages."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from typing import Any

import pytest
from PIL import Image

from tests.integration.tiny_pipeline.project import ROOT, TinyProject


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A project with two runs that differ in one field."""
    project = TinyProject(tmp_path_factory.mktemp("explained"))
    project.vico("run")
    project.vico("run", "--set", "square.power=3")
    return project


def test_diff_names_config_inputs_counts_metrics_and_outputs(two_runs):
    second, first = two_runs.runs()
    diff = json.loads(two_runs.vico("diff", first, second, "--json"))
    assert diff["runs"] == [first, second] and not diff["same"]
    assert diff["config"] == [{"stage": "square", "name": "square.power", "a": "2", "b": "3"}]
    assert [(value["stage"], value["name"]) for value in diff["inputs"]] == [("total", "square")]
    assert [(value["stage"], value["name"]) for value in diff["counts"]] == [("total", "total")]
    metrics = [(value["stage"], value["name"], value["step"]) for value in diff["metrics"]]
    assert ("square", "length", 0) in metrics
    assert {value["stage"] for value in diff["outputs"]} == {"square", "total"}
    assert diff["code"] == diff["packages"] == []
    assert "square.power" in two_runs.vico("diff", first, second)


def test_a_run_does_not_differ_from_itself(two_runs):
    (run, _) = two_runs.runs()
    diff = json.loads(two_runs.vico("diff", run, run, "--json"))
    assert diff.pop("same") and diff.pop("runs") == [run, run]
    assert not any(diff.values())


def test_curves_that_differ_are_drawn(two_runs, tmp_path):
    second, first = two_runs.runs()
    path = tmp_path / "curves.png"
    two_runs.vico("diff", first, second, "--curves", str(path))
    assert two_runs.errors == f"1 curves in {path}\n", "length, of square"
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 1000
    two_runs.vico("diff", first, first, "--curves", str(path), code=2)
    assert "there is nothing to draw" in two_runs.errors


def test_diff_names_code_and_packages(tmp_path):
    project = TinyProject(tmp_path)
    project.vico("run")
    project.vico("run", "--force", "draw")
    second, first = project.runs()
    record = project.record("draw")
    name = next(name for name in record["sources"] if name.endswith("draw.py"))
    record["sources"][name], record["packages"]["torch"] = "0" * 64, "9.9"
    project.edit_record("draw", **record)
    diff = json.loads(project.vico("diff", first, second, "--json"))
    assert diff["same"], "the first run's records are read from superseded/"
    assert [(value["stage"], value["name"], value["b"]) for value in diff["code"]] == [
        ("draw", name, "0" * 64)
    ]
    assert [(value["name"], value["b"]) for value in diff["packages"]] == [("torch", "9.9")]


def test_reproduce_writes_a_config_with_the_same_fingerprints(two_runs, tmp_path):
    out = tmp_path / "again.yaml"
    recipe = json.loads(two_runs.vico("reproduce", "latest", "--out", str(out), "--json"))
    assert recipe["config"] == str(out) and recipe["verified"] is None
    site = two_runs.folder / "site.yaml"
    assert recipe["command"].startswith(f"vico run {out} --site {site} --storage ")
    assert not [note for note in recipe["notes"] if "fingerprint" in note or "packages" in note]
    assert recipe["commit"] == two_runs.record("draw")["git"]["commit"]
    two_runs.vico("reproduce", "latest", "--out", str(out), code=2)
    assert f"--out={out} exists" in two_runs.errors


def test_reproduce_verifies_in_a_fresh_storage(two_runs, tmp_path):
    arguments = ["--verify", "--fresh-storage", str(tmp_path / "fresh")]
    output = two_runs.vico("reproduce", "latest", "--out", str(tmp_path / "again.yaml"), *arguments)
    assert output.splitlines()[-1] == "every output is the same, byte for byte"
    two_runs.vico("reproduce", "latest", "--out", str(tmp_path / "third.yaml"), *arguments, code=2)
    assert "exists; name a folder that does not" in two_runs.errors


def test_reproduce_names_the_outputs_that_differ(two_runs, tmp_path):
    (path,) = (
        path
        for path in two_runs.storage.glob("square/*/record.json")
        if json.loads(path.read_text())["identity"]["config"] == {}
    )
    before = path.read_text()
    record = json.loads(before)
    first = two_runs.runs()[1]
    path.write_text(json.dumps({**record, "outputs": {}}))
    try:
        arguments = ["--verify", "--fresh-storage", str(tmp_path / "fresh")]
        output = two_runs.vico("reproduce", first, "--out", str(tmp_path / "again.yaml"), *arguments, code=1)
    finally:
        path.write_text(before)
    assert "differs: square/part-0.txt" in output


def test_reproduce_names_the_site_file_that_was_given(tmp_path):
    """Not the name in the file, which another site file of this machine may have."""
    project = TinyProject(tmp_path / "a project")
    used, other = (project.folder / name for name in ("site.yaml", "other.yaml"))
    used.write_text("name: local\ntracking: {enabled: false}\n")
    shutil.copy(used, other)
    project.vico("run")

    def recipe(*options: str) -> dict[str, Any]:
        """Return the answer of a command that gets the storage, and a site only from `options`."""
        (tmp_path / "again.yaml").unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.integration.tiny_pipeline.command", "reproduce", "latest"]
        command += ["--json", "--out", str(tmp_path / "again.yaml"), "--storage", str(project.storage)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        output = subprocess.check_output([*command, *options], cwd=project.folder, env=environment)
        return json.loads(output)

    def site(command: str) -> str:
        words = shlex.split(command)
        return words[words.index("--site") + 1]

    assert site(recipe()["command"]) == str(used)
    assert site(recipe("--site", "other.yaml")["command"]) == str(other)
    assert not any("site" in note for note in recipe()["notes"])
    used.unlink()
    assert f"the run's site file {used} is not here; give another with --site" in recipe()["notes"]
    (path,) = project.storage.glob("runs/*/run.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "site": "lab", "site_file": None}))  # as an older vico wrote it
    assert "--site" not in recipe()["command"]
    assert "the file of the run's site lab is not recorded; add --site FILE" in recipe()["notes"]


def test_a_checkout_of_another_user_is_named_and_noted(tmp_path):
    project = TinyProject(tmp_path)
    refused = {
        "GIT_TEST_ASSUME_DIFFERENT_OWNER": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CONFIG_NOSYSTEM": "1",
    }
    output = project.vico("run", **refused)
    assert "commit and patch of the code are not recorded: fatal: detected dubious ownership" in output
    git = project.record("draw")["git"]
    assert git["commit"] is None and "safe.directory" in git["error"]
    audit = json.loads(project.vico("audit", "latest", "--json"))
    assert audit["problems"] == []
    assert any("git said: fatal: detected dubious ownership" in note for note in audit["notes"])
    recipe = json.loads(project.vico("reproduce", "latest", "--json", "--out", str(tmp_path / "again.yaml")))
    assert any("git said: fatal: detected dubious ownership" in note for note in recipe["notes"])

    project.vico("run", "--set", "seed=8")
    audit = json.loads(project.vico("audit", "latest", "--json", **refused))
    assert audit["problems"] == []
    assert any("was not looked for; git said: fatal: detected" in note for note in audit["notes"])
