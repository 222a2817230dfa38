"""Prometheus metrics of a run, scraped over HTTP, and the dashboard that shows them."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.metric_lines import STEP_METRICS_FILE, MetricsWriter, system_metrics_file
from cluster.settings.blocks import Resources, StageResources
from cluster.site import Site
from pipeline.results.runs import Runs
from pipeline.running.prometheus import serve_metrics
from tests.ports import free_port
from tests.waiting import PATIENCE_S

MONITORING = Path(__file__).parents[4] / "monitoring"

LABELS = ("stage", "state", "node", "metric")  # the text of a scrape has them in another order


@pytest.fixture
def samples(tmp_path) -> dict[tuple[str, tuple[str, ...]], float]:
    """The samples of a run whose training is at step 7, by name and values of the labels."""
    resources = Resources(stages={"consistency": StageResources(workers=1)})
    site = Site(storage=tmp_path, resources=resources)
    runs = Runs(tmp_path)
    run = runs.create(
        pipeline="p", fingerprints={"shard": "a", "consistency": "b"}, experiment="e", config={}, site="s"
    )
    run.stages["shard"].state = "done"
    run.stages["consistency"].state, run.stages["consistency"].attempt = "running", 2
    runs.save(run)
    for attempt in ("1", "2"):
        folder = tmp_path / "consistency" / "b" / "attempts" / attempt
        with MetricsWriter(folder / STEP_METRICS_FILE) as writer:
            writer.append(
                3 * int(attempt) + 1, {"loss": 0.5 / int(attempt), "tokens_per_second": 10.0, "x": 1}
            )
        with MetricsWriter(folder / "restarts.jsonl") as writer:
            writer.append(1, {"failures": 1})
        with MetricsWriter(folder / system_metrics_file("node-1")) as writer:
            writer.append(0, {"cpu_utilization_percentage": 25.0})
    port = free_port()
    with (
        serve_metrics(site, runs.run_folder(run.run), "127.0.0.1", port),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer,
    ):
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (sample.name, tuple(sample.labels[name] for name in LABELS if name in sample.labels)): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_scrape_has_states_steps_restarts_and_load(samples):
    assert samples["vico_stage_state", ("consistency", "running")] == 1
    assert samples["vico_stage_state", ("consistency", "done")] == 0
    assert samples["vico_stage_state", ("shard", "done")] == 1
    assert samples["vico_step", ("consistency",)] == 7, "of the last attempt"
    assert samples["vico_loss", ("consistency",)] == 0.25
    assert samples["vico_tokens_per_second", ("consistency",)] == 10
    assert samples["vico_step_metric", ("consistency", "x")] == 1
    assert samples["vico_restarts_total", ("consistency",)] == 2, "over all attempts"
    assert samples["vico_ranks", ("consistency",)] == 1
    assert samples["vico_node", ("consistency", "node-1", "cpu_utilization_percentage")] == 25


def test_the_dashboard_shows_metrics_that_exist(samples):
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    shown = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"vico_\w+", target["expr"])
    }
    from pipeline.running.prometheus import _STEP_METRICS

    exported = {name for name, _ in samples} | {f"vico_{name}" for name in _STEP_METRICS}
    assert shown and shown <= exported
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    jobs = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["scrape_configs"]
    assert [job["job_name"] for job in jobs] == ["vico", "ray"]
