"""Adoption of results that were made elsewhere, by their digest."""

import json
import shutil

import pytest

from tests.integration.tiny_pipeline.project import CONFIG, TinyProject


@pytest.fixture
def project(tmp_path):
    """Return a project that adopts the finished draw of another project with another seed."""
    other = TinyProject(tmp_path / "other")
    other.vico("run", "--set", "seed=99", "--until", "draw")
    adopting = TinyProject(tmp_path / "project")
    shutil.copytree(other.stage("draw") / "output", tmp_path / "elsewhere")
    adopt(adopting, tmp_path / "elsewhere")
    yield adopting
    adopting.close()


def adopt(project, folder):
    inputs = f"inputs:\n  adopt: {{draw: {folder}}}\n"
    (project.folder / "pipeline.yaml").write_text(CONFIG.replace("inputs:\n", inputs))


def test_an_adopted_result_replaces_its_stage_and_is_identified_by_digest(project, tmp_path):
    action, reasons = project.plan()["draw"]
    assert action == "run" and reasons[0].startswith(f"adopted from {tmp_path / 'elsewhere'}, digest ")
    project.vico("run")
    adopted = {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()}
    output = {path.name: path.read_bytes() for path in (project.stage("draw") / "output").iterdir()}
    assert output == adopted
    record = project.record("draw")
    assert record["inputs"] == {} and record["identity"]["config"]["digest"].startswith(
        reasons[0].split()[-1]
    )
    assert project.record("square")["inputs"] == {"draw": record["output_digest"]}

    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    adopt(project, tmp_path / "moved")
    assert {action for action, _ in project.plan().values()} == {"reuse"}, (
        "the path of the folder is not part of the identity"
    )
    (tmp_path / "moved" / "part-0.txt").write_text("1.0\n2.0")
    planned = project.plan()
    assert {action for action, _ in planned.values()} == {"run"}
    assert any("draw.digest: " in reason for reason in planned["draw"][1])

    audited = json.loads(project.vico("audit", "latest", "--json"))
    assert audited["ok"], "the copy in the store is complete"
    assert any("adopted from" in note and note.startswith("draw") for note in audited["notes"])


def test_after_a_kill_during_adoption_the_same_command_finishes(project):
    project.vico("run", code=-9, VICO_DIE="unrecorded:draw")
    project.vico("run")
    assert project.status()["stages"][0]["attempt"] == 2


@pytest.mark.parametrize("content, words", [(None, "is not a folder"), ({".hidden": "x"}, "has no files")])
def test_a_folder_that_cannot_be_adopted_is_refused_before_anything_starts(project, tmp_path, content, words):
    folder = tmp_path / "wrong"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    adopt(project, folder)
    project.vico("run", code=2)
    assert f"inputs.adopt.draw={folder} {words}" in project.errors
    assert not project.storage.exists()


def test_an_unknown_stage_is_refused(project, tmp_path):
    text = (project.folder / "pipeline.yaml").read_text()
    (project.folder / "pipeline.yaml").write_text(text.replace("{draw: ", "{drew: "))
    project.vico("plan", code=2)
    assert "inputs.adopt='drew' is not a stage; the stages are draw, square, total" in project.errors
