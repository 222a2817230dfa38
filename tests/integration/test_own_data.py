"""The tutorial docs/own-data.md, line by line in a new folder: its commands, their output, its files."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
import make_tutorial


def assert_prints_what_it_shows(page: str, folder: Path) -> None:
    run = make_tutorial.run_page(page, folder)
    assert make_tutorial.comparable(run) == make_tutorial.comparable(page)


def test_the_tutorial_up_to_its_first_run_prints_what_its_page_shows(tmp_path):
    page = make_tutorial.PAGE.read_text(encoding="utf-8")
    beginning = page[: page.rindex("```console", 0, page.index("$ vico run "))]
    assert "$ vico plan my.yaml" in beginning
    assert_prints_what_it_shows(beginning, tmp_path)


@pytest.mark.slow
def test_the_tutorial_prints_what_its_page_shows(tmp_path):
    assert_prints_what_it_shows(make_tutorial.PAGE.read_text(encoding="utf-8"), tmp_path)
