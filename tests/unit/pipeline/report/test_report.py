"""The report of a run: what it shows, what it says about missing parts, and that no text in it is obeyed."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from cluster.site import Site
from pipeline.report.figures import curves_of_attempts
from pipeline.report.write import write_report
from pipeline.results.runs import Runs
from tests.finished_runs import finished_run
from tests.reported_runs import kept_metrics, reported_run
from vico.errors import UserError

PLANTED = (
    '</style><script src="http://evil.test/a.js"></script>'
    "<img src=http://evil.test/b.png onerror=x>\x1b[2J\u202e"
)
NO_END = {"meta", "link", "img", "source", "input", "br"}


class Page(HTMLParser):
    """The elements of a page, its text, and whether every element is closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in NO_END:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())  # no-break spaces, too

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def page_of(storage, run, tmp_path, name="page.html"):
    written = write_report(Site(storage=storage), run.run, tmp_path / name)
    html = written.path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == [], "every element is closed"
    return page, html, written


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is done, its page, and the written report."""
    folder = tmp_path_factory.mktemp("finished")
    run = reported_run(folder / "runs", quality_gate={"min_questions": 100, "min_kept": 0.9})
    return run, *page_of(folder / "runs", run, folder)


def test_a_finished_run_shows_results_lineage_machines_and_times(finished):
    run, page, _, written = finished
    metrics = kept_metrics()
    [point] = [p for p in metrics["routed"] if p["threshold"] == metrics["absolute_threshold"]]
    assert written.missing == ()
    saved, kept = f"{100 * point['tokens_saved']:.1f} %", f"{point['quality_kept']:.3f}"
    low, high = point["quality_kept_interval"]
    sentence = f"saves {saved} of the visual tokens and keeps {kept} of the quality "
    sentence += f"(95 % interval {low:.3f} to {high:.3f})"
    assert sentence in page.text
    position = metrics["routed"].index(point)
    assert f"random tiles {metrics['random'][position]['quality_kept']:.3f}" in page.text
    assert "It passes the quality gate" in page.text and "small text" in page.text
    for stage, entry in run.stages.items():
        assert entry.fingerprint in page.text and entry.fingerprint[:12] in page.text, stage
    for text in ("c0ffeec0ffee, changed files", "torch 2.13.0", "2.0 GB", "50.0 %", "num_train", "plain"):
        assert text.replace("num_", "") in page.text, text
    assert "not the output above" not in page.text


def test_each_training_is_drawn_and_each_picture_is_within_the_page_with_a_text(finished):
    _, page, _, _ = finished
    images = page.all("img")
    texts = [image["alt"] for image in images]
    assert all(texts) and len(set(texts)) == len(images) >= 11
    assert sum("of stage consistency over 99 steps" in text for text in texts) == 3
    assert sum("of stage router over 99 steps" in text for text in texts) == 3
    kinds = [re.match(r"data:image/(png|webp|svg\+xml);base64,", image["src"])[1] for image in images]
    assert set(kinds) == {"png", "webp", "svg+xml"}, "a large picture is stored smaller"
    [dark] = {base64.b64decode(s["srcset"].partition(",")[2])[:5] for s in page.all("source")}
    assert dark == b"<?xml"


def test_tables_have_captions_and_headers(finished):
    _, page, html, _ = finished
    assert len(page.all("table")) == len(page.all("caption")) == html.count("<thead>") > 10
    assert {header["scope"] for header in page.all("th")} == {"col", "row"}
    names = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(names) == len(set(names))
    assert {link["href"] for link in page.all("a")} == {f"#{name}" for name in names}


def test_planted_texts_become_neither_elements_nor_control_characters(tmp_path):
    run = reported_run(tmp_path / "runs", planted=PLANTED, experiment=PLANTED)
    run.error, run.site = PLANTED, PLANTED
    Runs(tmp_path / "runs").save(run)
    page, html, _ = page_of(tmp_path / "runs", run, tmp_path)
    assert html.count("evil.test/b.png") > 20 and "&lt;script" in html, "it is shown"
    allowed = {"meta", "link", "style", "svg", "rect", "picture", "source", "img"}
    assert {tag for tag, _ in page.tags} & {"script", "iframe", "object", "base", "form", "link"} == {"link"}
    assert allowed >= {tag for tag, attrs in page.tags if "src" in attrs or "srcset" in attrs}
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on") or name == "style"], (tag, attrs)
        for name in ("src", "srcset", "href"):
            assert attrs.get(name, "#").startswith(("data:", "#")), (tag, name)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    assert "\\x1b[2J\\u202e" in html


def test_the_policy_allows_images_of_the_page_and_its_own_style_alone(finished):
    _, page, html, _ = finished
    [policy] = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy and "script-src" not in policy
    assert html.index("Content-Security-Policy") < html.index("<style>"), "it holds from the start"


def test_secrets_are_masked(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh12345678")
    planted = "https://me:s3cretpass@host/x?token=q1w2e3r4t5&b=1 hf_abcdefgh12345678"
    run = reported_run(tmp_path / "runs", planted=planted)
    run.error = planted
    Runs(tmp_path / "runs").save(run)
    _, html, _ = page_of(tmp_path / "runs", run, tmp_path)
    assert [mark for mark in ("s3cretpass", "q1w2e3r4t5", "hf_abcdefgh12345678") if mark in html] == []
    assert "https://host/x?token=***&amp;b=1 ***" in html


def test_questions_that_the_routed_model_answers_worse_are_counted_and_shown(finished):
    _, page, html, _ = finished
    counts = (
        "Of 4 test questions the routed model answers 1 worse than the start model, 1 better, and 2 as well."
    )
    assert counts in page.text
    [row] = re.findall(r'<tr>\s*<th scope="row"[^>]*>lost</th>.*?</tr>', html, re.DOTALL)
    assert "plain lost?" in row and "plain policy" in row and "2 of 3" in row
    assert "plain kept?" not in page.text and "plain won?" not in page.text


@pytest.mark.parametrize(
    "state, error, reason",
    [
        ("failed", "router: the loss is not finite", "The run is failed: router: the loss is not finite"),
        ("interrupted", None, "Stage router is interrupted."),
    ],
)
def test_a_run_that_ended_early_says_what_is_missing_and_why(tmp_path, state, error, reason):
    run = reported_run(tmp_path / "runs")
    run.state, run.error, run.stages["router"].state = state, error, state
    for stage in ("evaluate", "export"):
        run.stages[stage].state, run.stages[stage].attempt = "pending", 0
    for stage in ("router", "evaluate", "export"):
        (tmp_path / "runs" / stage / run.stages[stage].fingerprint / "record.json").unlink()
    Runs(tmp_path / "runs").save(run)
    page, _, written = page_of(tmp_path / "runs", run, tmp_path)
    assert "4 of 7 stages are done. Not done: router, evaluate, export." in page.text
    assert any(line.startswith("Stage evaluate was not reached: the run is") for line in written.missing)
    assert reason.replace("The run is failed", "Stage router is failed") in page.text
    if error:
        assert f"The run ended with an error. {error}" in page.text
    assert "router over 99 steps" in " ".join(image["alt"] for image in page.all("img")), (
        "its steps are shown"
    )
    assert len(page.all("h2")) == 9


def test_a_run_without_an_evaluate_stage_says_so(tmp_path):
    run = reported_run(tmp_path / "runs")
    run.stages = {stage: run.stages[stage] for stage in ("shard", "consistency")}
    Runs(tmp_path / "runs").save(run)
    page, _, written = page_of(tmp_path / "runs", run, tmp_path)
    assert "Stage evaluate is not part of this run, which ends with stage consistency." in written.missing
    assert "done until consistency" in page.text and "All 2 stages are done." in page.text


def test_gone_changed_and_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    run = reported_run(tmp_path / "runs")
    folders = {stage: tmp_path / "runs" / stage / entry.fingerprint for stage, entry in run.stages.items()}
    (folders["evaluate"] / "output" / "figures" / "routed_pictures.png").unlink()
    (folders["router"] / "output" / "figures" / "reliability.png").write_bytes(b"other bytes")
    (folders["label"] / "record.json").write_text("{")
    page, _, written = page_of(tmp_path / "runs", run, tmp_path)
    assert any(
        "figures/routed_pictures.png of stage evaluate cannot be read" in line for line in written.missing
    )
    assert any(
        "figures/reliability.png of stage router is gone or differs" in line for line in written.missing
    )
    assert any("Stage label cannot be shown" in line and "damaged" in line for line in written.missing)
    assert "passes the quality gate" in page.text and len(written.missing) == 3


def test_metrics_of_another_form_cost_their_parts_alone(tmp_path):
    run = finished_run(tmp_path / "runs", {**kept_metrics(), "routed": [{"threshold": 1}]})
    page, _, written = page_of(tmp_path / "runs", run, tmp_path)
    assert any("another form than this version of vico writes" in line for line in written.missing)
    assert "Stages, in the order they run" in page.text


def test_an_earlier_report_is_replaced_and_no_other_file_is(tmp_path):
    run = finished_run(tmp_path / "runs", kept_metrics())
    site = Site(storage=tmp_path / "runs")
    first = write_report(site, run.run, tmp_path / "a.html")
    assert write_report(site, run.run, tmp_path / "a.html").num_bytes == first.num_bytes
    assert first.as_json()["report"] == str(tmp_path / "a.html")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"image": "1.jpg"}))
    for path, fault in (
        (data, "is not a report of vico"),
        (tmp_path, "is a folder"),
        (data / "x", "is not a folder"),
    ):
        with pytest.raises(UserError, match=fault):
            write_report(site, run.run, path)
    assert json.loads(data.read_text()) == {"image": "1.jpg"}


def test_a_long_curve_is_drawn_as_means_and_keeps_its_gaps():
    values = {step: float(step) for step in range(1, 10_001)}
    steps, numbers = curves_of_attempts({"loss": values})["loss"]
    assert len(steps) == 500 and steps[0] == numbers[0] == 10.5 and numbers.mean() == pytest.approx(5000.5)
    _, gaps = curves_of_attempts({"loss": {1: 1.0, 2: float("inf"), 3: float("nan")}})["loss"]
    assert gaps[0] == 1 and str(gaps[1]) == str(gaps[2]) == "nan"
