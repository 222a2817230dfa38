"""Results that README and docs quote: run them, keep their metrics, write tables, sentences and
pictures (`make figures`).

A page quotes a run in a block: a comment with the run, its commit and its command, and the text with names of
values in braces; below it the same text with the values. Only the lower part is written here.

    python docs/make_figures.py            run every config of RUNS that has changed, keep, write
    python docs/make_figures.py --write    write the pages from the kept metrics
    python docs/make_figures.py --check    say which pages differ from the kept metrics; write nothing
    python docs/make_figures.py --keep quickstart --run RUN --storage DIR    keep the results of this run
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figure_values import values
from PIL import Image

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
STORAGE = ROOT / "runs"
_BLOCK = re.compile(
    r"<!-- figures of (?P<name>[\w-]+)(?P<source>[^\n]*)\n(?P<template>.*?)\n-->\n(?P<text>.*?)\n?"
    r"<!-- end of figures -->",
    re.DOTALL,
)
_WIDTH = 100
_WRAP = {"break_long_words": False, "break_on_hyphens": False}


@dataclass(frozen=True)
class QuotedRun:
    """A run that pages quote: its config, and picture of the evaluate stage -> file in docs/images."""

    config: str
    pictures: dict[str, str]


RUNS = {
    "quickstart": QuotedRun(
        "configs/quickstart.yaml",
        {
            "quality_against_tokens.png": "quickstart_quality.png",
            "ratios_by_content.png": "quickstart_ratios.png",
            "routed_pictures.png": "quickstart_pictures.jpg",
        },
    ),
    "demo": QuotedRun("configs/demo.yaml", {"quality_against_tokens.png": "demo_quality.png"}),
    "headline": QuotedRun("configs/headline.yaml", {"quality_against_tokens.png": "headline_quality.png"}),
}


def written_page(text: str) -> str:
    """Return a page with the text of each block made from the kept metrics of its run.

    A block of a run that is not kept stays as it is. Raises SystemExit for a value that the metrics lack.
    """

    def block(match: re.Match[str]) -> str:
        name, template = match["name"], match["template"]
        folder = FIGURES / name
        if not (folder / "run.json").is_file():
            return match[0]
        try:
            shown = reflowed(template.format_map(values(folder)))
        except (AttributeError, KeyError, TypeError) as error:
            raise SystemExit(f"a block of {name} names a value that it does not have: {error}") from error
        head = f"<!-- figures of {name}{source_line(name)}"
        return f"{head}\n{template}\n-->\n{shown}\n<!-- end of figures -->"

    return _BLOCK.sub(block, text)


def reflowed(text: str) -> str:
    """Return Markdown with paragraphs and list items broken again at _WIDTH; tables stay."""
    paragraphs: list[str] = []
    for line in text.splitlines():
        continues = paragraphs and paragraphs[-1] and line and not line.startswith(("|", "- "))
        if continues and not paragraphs[-1].startswith("|"):
            paragraphs[-1] += " " + line.strip()
        else:
            paragraphs.append(line)
    return "\n".join(
        line
        if not line or line.startswith("|")
        else textwrap.fill(line, _WIDTH, subsequent_indent="  " if line.startswith("- ") else "", **_WRAP)
        for line in paragraphs
    )


def source_line(name: str) -> str:
    """Return what a block says about the run that it quotes."""
    run = kept_run(name)
    return f": run {run['run']}, commit {run['commit'][:7]}, `{run['command']}`"


def kept_run(name: str) -> dict[str, Any]:
    """Return run.json of a kept run."""
    return json.loads((FIGURES / name / "run.json").read_text(encoding="utf-8"))


def runs_not_kept(text: str) -> set[str]:
    """Return the names of the runs that a page quotes and that are not in docs/figures."""
    names = {match["name"] for match in _BLOCK.finditer(text)}
    return {name for name in names if not (FIGURES / name / "run.json").is_file()}


def text_outside_blocks(text: str) -> str:
    """Return a page without its blocks."""
    return _BLOCK.sub("", text)


def keep(name: str, run: str, storage: Path) -> None:
    """Copy metrics and pictures of a finished run, and note what they were made from.

    Raises SystemExit if a stage ran with uncommitted changes: nobody could make the same results.
    """
    run_file = json.loads((storage / "runs" / run / "run.json").read_text(encoding="utf-8"))
    if run_file["state"] != "done":
        raise SystemExit(f"run {run} is {run_file['state']}; only a run that is done can be quoted")
    folders = {stage: storage / stage / entry["fingerprint"] for stage, entry in run_file["stages"].items()}
    records = {
        stage: json.loads((folder / "record.json").read_text(encoding="utf-8"))
        for stage, folder in folders.items()
    }
    if dirty := [stage for stage, record in records.items() if record["git"].get("dirty")]:
        raise SystemExit(
            f"run {run}: {', '.join(dirty)} ran with uncommitted changes; commit, then run again"
        )
    kept = FIGURES / name
    kept.mkdir(parents=True, exist_ok=True)
    evaluated = folders["evaluate"] / "output"
    shutil.copyfile(evaluated / "metrics.json", kept / "metrics.json")
    router = folders.get("joint_router", folders["router"])  # of the exported model
    shutil.copyfile(router / "output" / "metrics.json", kept / "router.json")
    pictures = {target: _kept_picture(evaluated, source, target) for source, target in _pictures(name)}
    content = {
        "run": run,
        "command": f"vico run {RUNS[name].config}",
        "commit": records["evaluate"]["git"]["commit"],
        "code_versions": {stage: record["identity"]["code_version"] for stage, record in records.items()},
        "fingerprints": {stage: record["fingerprint"] for stage, record in records.items()},
        "seconds": {stage: record["seconds"] for stage, record in records.items()},
        "counts": {stage: record["counts"] for stage, record in records.items()},
        "packages": {
            package: records["evaluate"]["packages"].get(package)
            for package in ("torch", "transformers", "deepspeed", "ray", "numpy", "pillow")
        },
        "sha256": {
            **{file: _sha256(kept / file) for file in ("metrics.json", "router.json")},
            **pictures,
        },
    }
    (kept / "run.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _pictures(name: str) -> list[tuple[str, str]]:
    return list(RUNS[name].pictures.items())


def _kept_picture(evaluated: Path, source: str, target: str) -> str:
    """Copy a figure to docs/images and return its sha256."""
    path = ROOT / "docs" / "images" / target
    if path.suffix == ".png":
        shutil.copyfile(evaluated / "figures" / source, path)
    else:
        with Image.open(evaluated / "figures" / source) as picture:
            picture.convert("RGB").save(path, quality=85, optimize=True)
    return _sha256(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def finished_run(name: str, storage: Path) -> str:
    """Run the config of a quoted run, or find its result if it is there; return the id of the run."""
    command = ["vico", "run", RUNS[name].config, "--storage", str(storage), "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return str(json.loads(done.stdout.splitlines()[-1])["run"])


def write_pages(*, check: bool) -> int:
    """Write the pages, or with `check` only say which are out of date. Return the exit code."""
    outdated = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        written = written_page(text)
        for name in sorted(runs_not_kept(text)):
            print(f"{page.relative_to(ROOT)} quotes {name}, which docs/figures lacks; run: make figures")
            outdated = 1
        if written == text:
            continue
        if check:
            print(f"{page.relative_to(ROOT)} differs from docs/figures; run: make figures")
            outdated = 1
        else:
            page.write_text(written, encoding="utf-8")
    return outdated


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say what is out of date; write nothing")
    parser.add_argument("--write", action="store_true", help="write the pages from the kept metrics")
    parser.add_argument(
        "--keep", metavar="NAME", choices=RUNS, help="keep the results of --run under this name"
    )
    parser.add_argument("--run", help="id of the run to keep")
    parser.add_argument("--only", metavar="NAME", choices=RUNS, help="run and keep only this one")
    parser.add_argument("--storage", type=Path, default=STORAGE, help="storage of the runs")
    options = parser.parse_args()
    if options.keep:
        if not options.run:
            parser.error("--keep needs --run")
        keep(options.keep, options.run, options.storage)
    elif not (options.check or options.write):
        # All run before anything is kept: kept files are changes that are not committed.
        names = [options.only] if options.only else list(RUNS)
        runs = {name: finished_run(name, options.storage) for name in names}
        for name, run in runs.items():
            keep(name, run, options.storage)
    return write_pages(check=options.check)


if __name__ == "__main__":
    sys.exit(main())
