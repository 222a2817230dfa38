"""The tutorial docs/own-data.md, line by line in a new folder: its commands, their output, its files."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
import make_tutorial


@pytest.mark.slow
def test_the_tutorial_prints_what_its_page_shows(tmp_path):
    page = make_tutorial.PAGE.read_text(encoding="utf-8")
    run = make_tutorial.run_page(page, tmp_path)
    assert make_tutorial.comparable(run) == make_tutorial.comparable(page)
