"""Results that README and docs quote are those of the kept runs, which are of the current code."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest

from cluster.site import Site
from pipeline.config.graph import pipeline_graph
from pipeline.config.pipeline_file import load_config
from pipeline.planning.request import RunRequest, open_pipeline

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import make_figures  # noqa: E402

_RESULT = re.compile(r"(?<![\w.])(?:[01]\.\d{3}|\d+\.\d ?%)(?!\w|\.\d)")
"""What a result looks like: a quality or AUC of three decimals, a share with one."""
DUE: tuple[str, ...] = ()
"""Runs that are not kept for the current code yet. After `make figures` (an hour) they pass, and strict marks
demand that they are removed here."""


def _due(name: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(name in DUE, reason="its run takes an hour: make figures", strict=True)


def problems(page: str) -> list[str]:
    """Return what is wrong with the results that a page quotes: one line each."""
    loose = _RESULT.findall(make_figures.text_outside_blocks(page))
    lines = [f"{number} is quoted without its run" for number in loose]
    written = make_figures.written_page(page).splitlines()
    pairs = zip(page.splitlines(), written, strict=False)
    lines += [f"differs from the kept metrics: {shown}" for shown, kept in pairs if shown != kept]
    return lines


@pytest.mark.parametrize("page", make_figures.PAGES, ids=lambda page: page.name)
def test_every_quoted_result_is_the_kept_one(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- figures of " in text
    assert problems(text) == []


@pytest.mark.parametrize(
    "old, new",
    [
        (r"keeps 0\.\d{3}", "keeps 0.123"),
        ("run 20", "run 19"),
        ("<!-- end of figures -->", "AUC is 0.837.\n<!-- end of figures -->"),
        ("## Quickstart", "The router keeps 0.981.\n\n## Quickstart"),
        ("## Quickstart", "The router saves 36.8 % of the tokens.\n\n## Quickstart"),
    ],
)
def test_a_result_that_was_changed_or_has_no_run_is_seen(old, new):
    page = make_figures.written_page((ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    changed = re.sub(old, new, page, count=1)
    assert changed != page
    assert problems(changed)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=_due(name)) for name in make_figures.RUNS],
)
def test_kept_runs_are_of_the_current_code_and_config(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = make_figures.kept_run(name)
    graph = pipeline_graph()
    config = load_config(Path(make_figures.RUNS[name].config), graph)
    versions = {spec.name: spec.module.CODE_VERSION for spec in config.stages_of(graph).stages}
    assert run["code_versions"] == versions, f"{name}: a stage has changed; run: make figures"
    request = RunRequest(Path(make_figures.RUNS[name].config), Site(storage=tmp_path))
    planned = {stage.stage: stage.fingerprint for stage in open_pipeline(request, graph).planned}
    assert run["fingerprints"] == planned, f"{name}: config, model or data changed; run: make figures"


@pytest.mark.parametrize(
    "name", [name for name in make_figures.RUNS if (make_figures.FIGURES / name).is_dir()]
)
def test_kept_metrics_and_pictures_are_those_of_the_run(name):
    run = json.loads((make_figures.FIGURES / name / "run.json").read_text(encoding="utf-8"))
    assert {*make_figures.RUNS[name].pictures.values(), "metrics.json", "router.json"} == set(run["sha256"])
    for file, sha256 in run["sha256"].items():
        folder = make_figures.FIGURES / name if file.endswith(".json") else ROOT / "docs" / "images"
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == sha256, file


@pytest.mark.parametrize("name", make_figures.RUNS)
def test_the_rows_of_the_runs_among_experiments_are_those_of_the_kept_runs(name):
    """docs/router.md compares them with runs that are not kept."""
    text = (ROOT / "docs" / "router.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\|[^|\n]*\({name}\) \|.*$", text, re.MULTILINE)
    tiles, calib, test = (cell.strip() for cell in row.strip("|").split("|")[-3:])
    router = json.loads((make_figures.FIGURES / name / "router.json").read_text(encoding="utf-8"))
    kept = (f"{router['num_train']:,}", f"{router['auc_calib']:.3f}", f"{router['auc']:.3f}")
    assert (tiles, calib, test) == kept


@pytest.mark.parametrize("name", make_figures.RUNS)
def test_the_kinds_of_tiles_are_by_the_routers_of_the_kept_runs(name):
    text = (ROOT / "docs" / "router.md").read_text(encoding="utf-8")
    assert f"{name}'s run `{make_figures.kept_run(name)['run']}`" in " ".join(text.split())


def test_a_share_is_written_with_a_space_and_an_interval_with_both_ends():
    from figure_values import Interval, Number

    assert f"{Number(0.3999):.1%}, {Number(0.989):.3f}" == "40.0 %, 0.989"
    assert f"{Interval((0.62749, 0.82406)):.1%}; {Interval((-0.03, 0.067)):+.3f}" == (
        "62.7 to 82.4 %; -0.030 to +0.067"
    )
