"""What MLflow shows of a run as a whole: final metrics, its user and source, and facts about its model."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.site import Site
from pipeline.config.graph import MODEL_SOURCES, SOURCES
from pipeline.results.quality import Quality, run_quality
from pipeline.results.records import Record
from pipeline.results.runs import RunFile
from pipeline.results.stage_folder import StageFolder
from vico.shown_text import printable

LAST = "last_"
"""Start of the name of a count that repeats the last value of a metric of the stage."""


def final_metrics(run: RunFile, storage: Path) -> dict[str, float]:
    """Return the metrics of a run that is done, for a list of runs; empty before.

    Quality and tokens of the exported model, and `STAGE/NAME`, the last value of each metric of a training.
    """
    if run.state != "done":
        return {}
    quality = run_quality(run, storage)
    metrics = {} if quality is None else _quality_metrics(quality)
    for stage, record in _records(run, storage):
        for name, value in record.counts.items():
            if name.startswith(LAST) and isinstance(value, int | float):
                metrics[f"{stage}/{name.removeprefix(LAST)}"] = float(value)
    return metrics


def _quality_metrics(quality: Quality) -> dict[str, float]:
    low, high = quality.kept_interval or (None, None)
    values = {
        "quality_kept": quality.kept,
        "quality_kept_low": low,
        "quality_kept_high": high,
        "tokens_saved": quality.tokens_saved,
        "test_questions": quality.num_questions,
        "router_auc": quality.auc,
        **{f"lead_over_{name}": lead.difference for name, lead in quality.leads.items()},
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def source_tags(run: RunFile) -> dict[str, str]:
    """Return MLflow's own tags about who started the run and with what."""
    user = run.attempts[-1].user if run.attempts else ""
    return {
        "mlflow.user": user,
        "mlflow.source.name": "vico submit" if run.submission else "vico run",
        "mlflow.source.type": "JOB" if run.submission else "LOCAL",
    }


def source_digests(run: RunFile, storage: Path) -> dict[str, str]:
    """Return name -> digest of the data that the stages of a run read from outside."""
    digests: dict[str, str] = {}
    for stage, entry in run.stages.items():
        attempt = StageFolder(storage, stage, entry.fingerprint).last_attempt_file()
        digests |= attempt.inputs if attempt else {}
    return {name: digests[name] for name in SOURCES if name in digests and name not in MODEL_SOURCES}


def version_tags(run: RunFile, record: Record, address: str, site: Site) -> dict[str, str]:
    """Return what a registered version says of its model: quality, threshold, origin, and where it is.

    `address` names the files in an object store, or gives their path on the machine that wrote them.
    """
    quality, counts = run_quality(run, site.storage), record.counts
    place = address if "://" in address else f"{record.facts.get('host', '')}:{address}"
    tags = {
        "vico.address": place,
        "vico.threshold": _number(counts.get("absolute_threshold")),
        "vico.base_model": str(counts.get("base_model", "")),
        "vico.base_license": str(counts.get("base_licence", "")),
    }
    if quality is not None:
        low, high = quality.kept_interval or (None, None)
        tags |= {
            "vico.quality_kept": _number(quality.kept),
            "vico.quality_kept_interval": "" if low is None else f"{_number(low)} to {_number(high)}",
            "vico.tokens_saved": _number(quality.tokens_saved),
            "vico.test_questions": str(quality.num_questions),
        }
    return {name: printable(text) for name, text in tags.items() if text}


def version_description(tags: Mapping[str, str]) -> str:
    """Return what a registered version says of its model; empty if its quality is not known.

    `tags` are those of `version_tags`. The figures are rounded as in the summary of a run.
    """
    if "vico.quality_kept" not in tags:
        return ""
    low, between, high = tags.get("vico.quality_kept_interval", "").partition(" to ")
    interval = f" (95 % interval {float(low):.3f} to {float(high):.3f})" if between else ""
    threshold = tags.get("vico.threshold")
    return (
        f"Saves {float(tags['vico.tokens_saved']):.1%} of the visual tokens and keeps "
        f"{float(tags['vico.quality_kept']):.3f} of the quality{interval}, on "
        f"{int(tags['vico.test_questions']):,} test questions"
        f"{f', at threshold {float(threshold):.3f}' if threshold else ''}. Files: {tags['vico.address']}"
    )


def _records(run: RunFile, storage: Path) -> Iterator[tuple[str, Record]]:
    for stage, entry in run.stages.items():
        record = StageFolder(storage, stage, entry.fingerprint).record()
        if record is not None:
            yield stage, record


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.6g}"
