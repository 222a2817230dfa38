"""`vico diff` and `vico reproduce`: real commands over tiny stages."""

import json

import pytest
from PIL import Image

from tests.integration.tiny_pipeline.project import TinyProject


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
    assert recipe["command"].startswith(f"vico run {out} --site tiny --storage ")
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
