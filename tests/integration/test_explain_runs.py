"""What tells two runs apart, and how one is got again: real commands over tiny stages."""

import json

import pytest
from PIL import Image

from tests.integration.tiny_pipeline.project import TinyProject


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project with two runs that differ in one field."""
    project = TinyProject(tmp_path_factory.mktemp("explained"))
    project.vico("run")
    project.vico("run", "--set", "square.power=3")
    return project


def test_diff_names_config_inputs_counts_metrics_and_outputs(made):
    second, first = made.runs()
    found = json.loads(made.vico("diff", first, second, "--json"))
    assert found["runs"] == [first, second] and not found["same"]
    assert found["config"] == [{"stage": "square", "name": "square.power", "a": "2", "b": "3"}]
    assert [(one["stage"], one["name"]) for one in found["inputs"]] == [("total", "square")]
    assert [(one["stage"], one["name"]) for one in found["counts"]] == [("total", "total")]
    assert ("square", "length", 0) in [(one["stage"], one["name"], one["step"]) for one in found["metrics"]]
    assert {one["stage"] for one in found["outputs"]} == {"square", "total"}
    assert found["code"] == found["packages"] == []
    assert "square.power" in made.vico("diff", first, second)


def test_a_run_does_not_differ_from_itself(made):
    (run, _) = made.runs()
    found = json.loads(made.vico("diff", run, run, "--json"))
    assert found.pop("same") and found.pop("runs") == [run, run]
    assert not any(found.values())


def test_curves_that_differ_are_drawn(made, tmp_path):
    second, first = made.runs()
    path = tmp_path / "curves.png"
    made.vico("diff", first, second, "--curves", str(path))
    assert made.errors == f"1 curves in {path}\n", "length, of square"
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 1000
    made.vico("diff", first, first, "--curves", str(path), code=2)
    assert "there is nothing to draw" in made.errors


def test_diff_names_code_and_packages(tmp_path):
    project = TinyProject(tmp_path)
    project.vico("run")
    project.vico("run", "--force", "draw")
    second, first = project.runs()
    record = project.record("draw")
    name = next(name for name in record["sources"] if name.endswith("draw.py"))
    record["sources"][name], record["packages"]["torch"] = "0" * 64, "9.9"
    project.edit_record("draw", **record)
    found = json.loads(project.vico("diff", first, second, "--json"))
    assert found["same"], "the first run's records are found where they were set aside"
    assert [(one["stage"], one["name"], one["b"]) for one in found["code"]] == [("draw", name, "0" * 64)]
    assert [(one["name"], one["b"]) for one in found["packages"]] == [("torch", "9.9")]


def test_reproduce_gives_a_config_with_the_same_fingerprints(made, tmp_path):
    out = tmp_path / "again.yaml"
    recipe = json.loads(made.vico("reproduce", "latest", "--out", str(out), "--json"))
    assert recipe["config"] == str(out) and recipe["verified"] is None
    assert recipe["command"].startswith(f"vico run {out} --site tiny --storage ")
    assert not [note for note in recipe["notes"] if "fingerprint" in note or "packages" in note]
    assert recipe["commit"] == made.record("draw")["git"]["commit"]
    made.vico("reproduce", "latest", "--out", str(out), code=2)
    assert f"--out={out} exists" in made.errors


def test_reproduce_verifies_in_a_fresh_storage(made, tmp_path):
    arguments = ["--verify", "--fresh-storage", str(tmp_path / "fresh")]
    output = made.vico("reproduce", "latest", "--out", str(tmp_path / "again.yaml"), *arguments)
    assert output.splitlines()[-1] == "every output is the same, byte for byte"
    made.vico("reproduce", "latest", "--out", str(tmp_path / "third.yaml"), *arguments, code=2)
    assert "exists; name a folder that does not" in made.errors


def test_reproduce_says_what_is_not_the_same(made, tmp_path):
    (path,) = (
        path
        for path in made.storage.glob("square/*/record.json")
        if json.loads(path.read_text())["identity"]["config"] == {}
    )
    before = path.read_text()
    record = json.loads(before)
    first = made.runs()[1]
    path.write_text(json.dumps({**record, "outputs": {}}))
    try:
        arguments = ["--verify", "--fresh-storage", str(tmp_path / "fresh")]
        output = made.vico("reproduce", first, "--out", str(tmp_path / "again.yaml"), *arguments, code=1)
    finally:
        path.write_text(before)
    assert "differs: square/part-0.txt" in output
