"""The tutorial docs/own-data.md, up to its run: the data that it makes, and the files that it shows.

`tests/unit/test_docs.py` parses its commands, `tests/integration/test_own_data.py` runs all of them.
"""

import sys
from pathlib import Path

import pytest

from cluster.site_files import load_site
from pipeline.config.graph import pipeline_graph
from pipeline.config.pipeline_file import load_config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import make_tutorial  # noqa: E402

PAGE = make_tutorial.PAGE.read_text(encoding="utf-8")


def part_until(command: str) -> str:
    """Return the page up to a command, with the command's block closed before it."""
    head = PAGE.partition(f"$ {command}")[0]
    return head.rpartition("```console")[0]


@pytest.mark.slow
def test_what_comes_before_the_training_is_as_the_page_shows_it(tmp_path):
    page = part_until("vico run my.yaml")
    run = make_tutorial.run_page(page, tmp_path)
    assert make_tutorial.comparable(run) == make_tutorial.comparable(page)
    assert load_config(tmp_path / "my.yaml", pipeline_graph()).consistency.tiles_per_pack == 32


def test_the_lines_for_a_gpu_have_a_site_and_settings_that_are_accepted(tmp_path):
    files = make_tutorial.files(PAGE)
    for name in ("my.yaml", "gpu.yaml"):
        (tmp_path / name).write_text(files[name])
    site = load_site(tmp_path / "gpu.yaml")
    assert site.resources.gpus_per_worker == 1 and site.train.memory.zero_stage == 2
    (tmp_path / "models").symlink_to(ROOT / "models")
    config = load_config(tmp_path / "my.yaml", pipeline_graph(), ["consistency.max_steps=20"])
    assert config.consistency.max_steps == 20


def test_a_changed_word_or_count_before_the_training_is_a_difference_and_a_loss_after_it_is_none():
    page = "$ vico data check my.yaml\nread 12\n$ vico run my.yaml\nrun 20261128-145048-4v37: loss 0.2\n"
    other = page.replace("0.2", "0.31").replace("4v37", "abcd")
    assert make_tutorial.comparable(page) == make_tutorial.comparable(other)
    for changed in (page.replace("read 12", "read 13"), page.replace("loss", "lost")):
        assert make_tutorial.comparable(page) != make_tutorial.comparable(changed)


def test_a_command_that_fails_ends_the_tutorial(tmp_path):
    with pytest.raises(SystemExit, match=r"vico data check absent\.yaml ended with exit code 2"):
        make_tutorial.run_page("```console\n$ vico data check absent.yaml\n```\n", tmp_path)
