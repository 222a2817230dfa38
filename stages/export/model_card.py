"""README.md of an exported model: its origin, and what each threshold costs and saves.

The export stage and `vico export` write it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stages.controls import (
    COMPRESSED,
    FULL,
    LISTED,
    REFERENCE,
    PointMetrics,
    point_of,
    points_of,
    resampled_units,
)
from stages.export.start_model import StartModel
from vico.shown_text import markdown, markdown_code

CARD_FILE = "README.md"
Layout = Literal["hf", "flash"]

_CARD = """\
---
library_name: vico
pipeline_tag: image-text-to-text
---

# An InternVL with a router over its tiles

Each tile of a picture takes {tokens_full} visual tokens, or {tokens_compressed} if the router finds it
simple. {layout}
Ask it with `vico.load(folder).answer(picture, question)`; `vico route` shows its decisions on a picture.

| | |
|---|---|
| base model | {base_name}, sha256 of its weights `{base_digest}` |
| licence of the base model | {licence} |
| data | {samples} samples in {shards} shards, sha256 over the sha256 of the shards `{data_digest}` |
| licences of the data | {data_licences} |
| origins of the data | {data_origins} |
{run}| method | ViCO: consistency training against the base model, then a router trained on loss ratios |
| router on test tiles | AUC {auc}, {num_test} tiles |

## Thresholds

A tile is compressed if the router's probability of *compress* is at least the threshold; `config.json`
contains the calibrated one ({threshold:.6g}) as `{threshold_key}`. Measured on {num_samples} test
samples that no stage trained or calibrated on. Similarity is ANLS with cut 0.5; kept is its share of the base
model's similarity, {reference_similarity:.3f}, with a {level:.0%} interval over {resamples:,} resamples of
{units}.

| rule | threshold | tiles compressed | tokens saved | similarity | kept | interval | exact match |
|---|---:|---:|---:|---:|---:|---:|---:|
{rows}

The calibrated threshold is in bold; `thresholds.json` contains the rows of *ours*.{calibration}

*ours* decides each tile separately; *served* is the rule of a server
of the published Flash layout with the run's `evaluate.relative_threshold` (0.0 unless set; a Flash export
has 0.0): it keeps at least one tile of every prompt.

All tiles full: similarity {full:.3f}. All compressed: {compressed:.3f} with {compressed_saved:.1%} of tokens
saved.
"""
_LAYOUTS: Mapping[Layout, str] = {
    "hf": (
        "The folder is in Hugging Face layout; beside the tensors of transformers' InternVL it\n"
        "contains `compressed_connector.*` and `router.*`. Plain transformers ignores them: every tile then\n"
        "takes its full number of tokens."
    ),
    "flash": (
        "The folder is in the published Flash layout (`flash_mode`), which lmdeploy's PyTorch\n"
        "backend serves; a quantiser has to leave out `pooling_before_gating` and `gating`."
    ),
}
_THRESHOLD_KEYS: Mapping[Layout, str] = {
    "hf": "vico.absolute_threshold",
    "flash": "flash_absolute_threshold",
}


@dataclass(frozen=True)
class CardSources:
    """What a model card is written from. The stage does not know its `run`; `vico export` does."""

    start: StartModel
    manifest: Mapping[str, Any]
    """manifest.json of the shard stage."""
    evaluation: Mapping[str, Any]
    """metrics.json of the evaluate stage."""
    router: Mapping[str, Any]
    """metrics.json of the router stage."""
    layout: Layout = "hf"
    run: str = ""


def model_card(sources: CardSources) -> str:
    """Return the card as Markdown."""
    evaluation, router = sources.evaluation, sources.router
    compressed = point_of(evaluation, COMPRESSED)
    return _CARD.format(
        **_origin(sources),
        layout=_LAYOUTS[sources.layout],
        threshold_key=_THRESHOLD_KEYS[sources.layout],
        tokens_full=evaluation["tokens_a_tile"]["full"],
        tokens_compressed=evaluation["tokens_a_tile"]["compressed"],
        auc="not defined" if router["auc"] is None else f"{router['auc']:.3f}",
        num_test=f"{router['num_test']:,}",
        threshold=evaluation["absolute_threshold"],
        level=evaluation["intervals"]["level"],
        resamples=evaluation["intervals"]["resamples"],
        units=resampled_units(evaluation["intervals"]),
        calibration=_calibration(evaluation, router),
        num_samples=f"{evaluation['num_samples']:,}",
        reference_similarity=point_of(evaluation, REFERENCE)["similarity"],
        rows="\n".join(_rows(evaluation, evaluation["absolute_threshold"])),
        full=point_of(evaluation, FULL)["similarity"],
        compressed=compressed["similarity"],
        compressed_saved=compressed["tokens_saved"],
    )


def _origin(sources: CardSources) -> dict[str, str]:
    """Return the card's fields about the start model, the data and the run."""
    start, manifest = sources.start, sources.manifest
    shards = [shard["sha256"] for shard in manifest["shards"]]
    return {
        "base_name": markdown(start.name),
        "base_digest": start.weights_sha256,
        "licence": markdown(start.licence),
        "samples": f"{manifest['written']:,}",
        "shards": str(len(shards)),
        "data_digest": hashlib.sha256(json.dumps(shards).encode()).hexdigest(),
        "data_licences": _stated(manifest.get("licenses", {}), "as stated by each record"),
        "data_origins": _stated(manifest.get("origins", {}), "as named by each record"),
        "run": f"| run | {markdown_code(sources.run)} |\n" if sources.run else "",
    }


def _stated(counts: Mapping[str, int], how: str) -> str:
    """Return a table cell with the values and their numbers of samples; those without a value come last."""
    named = [f"{markdown(value)} ({count:,})" for value, count in counts.items() if value]
    unstated = counts.get("", 0)
    if not named:
        return "not stated by records or sets"
    return f"{how}: {', '.join(named)}" + (f"; {unstated:,} not stated" if unstated else "")


def _calibration(evaluation: Mapping[str, Any], router: Mapping[str, Any]) -> str:
    """Return sentences on how the threshold was chosen and how firm it is."""
    choice = evaluation.get("wanted_quality")
    if choice is not None:
        return (
            f" It was chosen on {choice['num_samples']:,} calibration samples for a kept quality of "
            f"{choice['wanted']:.1%}"
            + ("." if choice["reached"] else ", which no measured threshold reached there.")
        )
    if "threshold_margin" not in router:
        return ""
    return (
        f" It compresses {router['calibrated_share']:.1%} of the calibration tiles and "
        f"{router['blank_compressed']:,} of {router['blank_tiles']:,} blank ones; the nearest of their "
        f"scores is {router['threshold_margin']:.2g} away in log-odds, {router['share_in_margin']:.1%} of "
        "the test tiles are nearer."
    )


def _rows(evaluation: Mapping[str, Any], calibrated: float) -> list[str]:
    return [
        _row(control.rule, point, point["threshold"] == calibrated)
        for control in LISTED
        if control.rule
        for point in points_of(evaluation, control)
    ]


def _row(rule: str, point: PointMetrics, is_bold: bool) -> str:
    kept, span = point["quality_kept"], point.get("quality_kept_interval")
    cells = [
        rule,
        f"{point['threshold']:.6g}",
        f"{point['share_compressed']:.1%}",
        f"{point['tokens_saved']:.1%}",
        f"{point['similarity']:.3f}",
        "-" if kept is None else f"{kept:.1%}",
        "-" if span is None else f"{span[0]:.1%} to {span[1]:.1%}",
        f"{point['exact_match']:.1%}",
    ]
    return "| " + " | ".join(f"**{cell}**" if is_bold else cell for cell in cells) + " |"
