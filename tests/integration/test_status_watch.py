"""`vico status --watch` in a process beside the run that it shows."""

import pytest

from tests.integration.tiny_pipeline.project import TinyProject
from tests.waiting import PATIENCE_S, wait_until


@pytest.fixture
def project(tmp_path):
    project = TinyProject(tmp_path / "project")
    yield project
    project.close()


def test_watch_shows_how_far_a_run_is_and_ends_with_it(project):
    run, go = project.pause("square:2")
    watching = project.start("status", "latest", "--watch")
    lines: list[str] = []

    def shown(text: str) -> bool:
        lines.append(watching.stdout.readline())
        return text in lines[-1]

    wait_until(lambda: shown("parts"), watching)
    go.touch()
    rest, errors = watching.communicate(timeout=PATIENCE_S)
    run.communicate(timeout=PATIENCE_S)
    assert watching.returncode == 0 and errors == ""
    output = "".join(lines) + rest
    assert "square: " in output and "waits" in output
    assert rest.rstrip().splitlines()[-5].endswith(": done")  # above the table of three stages


def test_watch_needs_a_run_and_people(project):
    project.vico("status", "--watch", code=2)
    assert "--watch shows one run" in project.errors
    project.vico("status", "latest", "--watch", "--json", code=2)
    assert "leave out --json" in project.errors
