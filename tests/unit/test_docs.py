"""The documentation: links and file names in it exist, and generated pages are up to date."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer.main

from pipeline.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "vico|data_prep|cluster|stages|pipeline|tests|docs|configs|sites|models|examples|benchmarks"
_CODE = re.compile(r"^```\w*[^\n]*\n(.*?)^```$|^((?: {4}.*\n)+)", re.DOTALL | re.MULTILINE)
_FILE = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    names = _FILE.findall(page.read_text(encoding="utf-8"))
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()


@pytest.mark.parametrize("script", ["make_settings.py", "make_models.py"])
def test_generated_pages_are_up_to_date(script):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, f"docs/{script}", "--check"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def shown_commands(page: Path) -> list[str]:
    """Return the `vico` commands in the page's blocks of code, each with its continued lines."""
    blocks = [fenced or indented for fenced, indented in _CODE.findall(page.read_text(encoding="utf-8"))]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?vico [a-z]", line)]


def parse(words: list[str]) -> None:
    """Parse a `vico` command as the program does, without running it. Raises ClickException."""
    command, name, context = typer.main.get_command(app), "vico", None
    while True:
        context = command.make_context(name, words, parent=context)
        if not hasattr(command, "resolve_command"):
            return
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_a_page_shows_are_accepted(page):
    wrong = {}
    for line in shown_commands(page):
        words = shlex.split(re.split(r" [|>] | {2,}[a-z]", line)[0], comments=True)[1:]
        try:
            parse(words)
        except click.ClickException as error:
            wrong[line] = str(error)
    assert wrong == {}
