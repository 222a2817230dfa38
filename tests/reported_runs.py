"""A run with all seven stages and small files of the forms that the stages write, for the report."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.metric_lines import MetricLine, system_metrics_file
from pipeline.results.runs import RunAttempt, Runs
from tests.finished_runs import finished_stage

STAGES = ("shard", "consistency", "ratio", "label", "router", "evaluate", "export")
_DOCS = Path(__file__).parents[1] / "docs" / "figures" / "quickstart"
KEYS = ("kept", "lost", "won", "text-only")


def kept_metrics():
    """Return the metrics of a real evaluation."""
    metrics = json.loads((_DOCS / "metrics.json").read_text())
    for control in ("blind_oracle", "seeing_oracle", "fewer_tiles"):
        metrics.setdefault(control, [])
        for of_kind in metrics["by_kind"].values():
            of_kind.setdefault(control, [])
    metrics.setdefault("oracle_split", None)
    return metrics


def reported_run(storage, planted="plain", metrics=None, experiment="e", **config):
    """Return a run that is done; `planted` is in every text that comes from records, names and machines."""
    metrics = metrics or kept_metrics()
    if planted != "plain":
        metrics["ratio_by_content"][planted] = {"tiles": 3, "median": 1.0}
        metrics["by_kind"][planted] = metrics["by_kind"]["chart"]
    runs = Runs(storage)
    config = {"inputs": {"records": {"path": planted}, "model": "/models/m"}, **config}
    run = runs.create(
        pipeline="p",
        fingerprints=dict.fromkeys(STAGES, "a" * 64),
        experiment=experiment,
        config=config,
        site="s",
    )
    files = _files(planted, metrics)
    inputs, digests = {"records": "d" * 64}, {}
    for stage in STAGES:
        entry = run.stages[stage]
        entry.fingerprint = finished_stage(
            storage,
            run.run,
            stage,
            files[stage],
            {"num_train": 1124, "note": planted},
            inputs=inputs,
            git={"commit": "c0ffee" * 6 + "abcd", "dirty": True, "error": planted},
            packages={"torch": "2.13.0", planted: planted},
            facts={"host": planted, "platform": "Linux", "cpus": 2, "resources": {"workers": 2}},
            site=planted,
        )
        entry.state, entry.attempt, entry.seconds = "done", 1, 1.0
        record = json.loads((storage / stage / entry.fingerprint / "record.json").read_text())
        digests[stage] = record["output_digest"]
        inputs = {stage: digests[stage]}
    run.attempts.append(
        RunAttempt(started="2026-01-01T00:00:00+00:00", host=planted, pid=1, user=planted, state="done")
    )
    run.state = "done"
    runs.save(run)
    return run


def _files(planted, metrics):
    lines = [
        MetricLine(step, 1.0 + step, {"loss": 1 / step, "grad_norm": 1.0, "learning_rate": 1e-4}).text()
        for step in range(1, 100)
    ]
    usage = {"system/h/cpu_utilization_percentage": 50.0, "system/h/process_tree_memory_megabytes": 2000.0}
    training = {
        "attempt/metrics.jsonl": "".join(lines),
        f"attempt/{system_metrics_file('h')}": "".join(MetricLine(n, 1.0, usage).text() for n in range(3)),
    }
    router = json.loads((_DOCS / "router.json").read_text())
    return {
        "shard": {"manifest.json": "{}"},
        "consistency": {"policy/config.json": "{}", **training},
        "ratio": {"ratios.parquet": b"ratios"},
        "label": {"figures/losses_by_kind.png": png()},
        "router": {
            "metrics.json": json.dumps(router),
            "scores.parquet": _scores(metrics["absolute_threshold"]),
            "figures/reliability.png": png(),
            **training,
        },
        "evaluate": {
            "metrics.json": json.dumps(metrics),
            "predictions.parquet": _predictions(planted),
            "figures/routed_pictures.png": png(noise=True),
            "figures/ratios_by_content.png": png(),
        },
        "export": {"model/config.json": "{}"},
    }


def png(noise=False):
    """Return a PNG; with `noise` one of over 400 kB."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    if noise:
        pixels = np.random.default_rng(0).integers(0, 255, (500, 400, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def _scores(threshold):
    """Three tiles of each sample with a picture, stored out of order: the first and last are compressed."""
    rows = [
        {"key": key, "split": "test", "image": 0, "tile": tile, "p_compress": np.float32(p), "label": 1}
        for key in KEYS[:3]
        for tile, p in ((2, threshold), (0, 1.0), (1, 0.0))
    ]
    rows.append({**rows[0], "key": "blank-0", "split": "blank"})
    return _parquet(rows)


def _predictions(planted):
    rows = []
    for key, start, routed in (("kept", 1, 1), ("lost", 1, 0), ("won", 0, 1), ("text-only", 1, 1)):
        text = {"key": key, "kind": planted, "question": f"{planted} {key}?", "answer": f"{planted} 5"}
        rates = "" if key == "text-only" else "101"
        answers = [("reference", "0" * len(rates), start), ("policy", rates, routed)]
        if rates:
            answers.append(("policy", "111", 0))  # of a control
        for model, rates_of_model, similarity in answers:
            answer = {"model": model, "rates": rates_of_model, "similarity": float(similarity)}
            rows.append({**text, **answer, "prediction": f"{planted} {model}"})
    return _parquet(rows)


def _parquet(rows):
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), data)
    return data.getvalue()
