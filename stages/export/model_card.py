"""README.md of an exported model: where it comes from, and what each threshold costs and saves."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

_CARD = """\
---
library_name: vico
pipeline_tag: image-text-to-text
---

# An InternVL with a router over its tiles

Each tile of a picture takes {tokens_full} visual tokens, or {tokens_compressed} where the router finds it
simple. {layout}
`vico.checkpoints.load_model(folder)` opens it, `vico route` shows its decisions on a picture.

| | |
|---|---|
| base model | {base_name}, sha256 of its weights `{base_digest}` |
| licence of the base model | {licence} |
| data | {samples} samples in {shards} shards, sha256 over those of the shards `{data_digest}` |
| licences of the data | {data_licences} |
| origins of the data | {data_origins} |
{run}| method | ViCO: consistency training against the base model, then a router trained on loss ratios |
| router on test tiles | AUC {auc}, {num_test} tiles |

## Thresholds

A tile is compressed where the router's probability of *compress* is at least the threshold; `config.json`
holds the calibrated one ({threshold:.6g}) as `{threshold_key}`. Measured on {num_samples} test
samples that no stage trained or calibrated on. Similarity is ANLS with cut 0.5; kept is its share of the base
model's, which is {reference_similarity:.3f}.

| rule | threshold | tiles compressed | tokens saved | similarity | kept | exact match |
|---|---:|---:|---:|---:|---:|---:|
{rows}

The calibrated threshold is in bold. *ours* decides each tile by itself; *served* is what a server of the
published Flash layout does at `evaluate.relative_threshold` of the run (0.0 unless set; a Flash export says
0.0): it keeps at least one tile of every prompt.

All tiles full: similarity {full:.3f}. All compressed: {compressed:.3f} with {compressed_saved:.1%} of tokens
saved.
"""
_LAYOUTS = {
    "hf": (
        "The folder is in Hugging Face layout; beside the tensors of transformers' InternVL it\n"
        "holds `compressed_connector.*` and `router.*`, which plain transformers leaves aside: there every\n"
        "tile takes its full number of tokens."
    ),
    "flash": (
        "The folder is in the published Flash layout (`flash_mode`), which lmdeploy's PyTorch\n"
        "backend serves; a quantiser has to leave out `pooling_before_gating` and `gating`."
    ),
}
_THRESHOLD_KEYS = {"hf": "vico.absolute_threshold", "flash": "flash_absolute_threshold"}
_LICENCE = re.compile(r"^license:[ \t]*(\S.*)$", re.MULTILINE)


def stated_licence(base: Path) -> str:
    """The licence in the front matter of a model folder's README.md."""
    card = base / "README.md"
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2) if card.is_file() else []
    found = _LICENCE.search(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    return found[1].strip() if found else "not stated in its folder"


def model_card(
    base: tuple[str, str],
    licence: str,
    data: Mapping[str, Any],
    metrics: Mapping[str, Any],
    router: Mapping[str, Any],
    layout: Literal["hf", "flash"] = "hf",
    run: str = "",
) -> str:
    """Markdown from the base model's name and digest, its licence, the shards' manifest and the metrics of
    evaluate and router. The stage does not know its run; `vico export` does.
    """
    threshold = router["absolute_threshold"]
    shards = [shard["sha256"] for shard in data["shards"]]
    sizes = metrics["tokens_a_tile"]
    return _CARD.format(
        layout=_LAYOUTS[layout],
        threshold_key=_THRESHOLD_KEYS[layout],
        licence=licence,
        run=f"| run | `{run}` |\n" if run else "",
        tokens_full=sizes["full"],
        tokens_compressed=sizes["compressed"],
        base_name=base[0],
        base_digest=base[1],
        data_licences=_stated(data.get("licenses", {}), "as stated by each record"),
        data_origins=_stated(data.get("origins", {}), "as named by each record"),
        samples=f"{data['written']:,}",
        shards=len(shards),
        data_digest=hashlib.sha256(json.dumps(shards).encode()).hexdigest(),
        auc="not defined" if router["auc"] is None else f"{router['auc']:.3f}",
        num_test=f"{router['num_test']:,}",
        threshold=threshold,
        num_samples=f"{metrics['num_samples']:,}",
        reference_similarity=metrics["reference"]["similarity"],
        rows="\n".join(
            _row(rule, entry, entry["threshold"] == threshold)
            for rule, name in (("ours", "routed"), ("served", "served"))
            for entry in metrics[name]
        ),
        full=metrics["full"]["similarity"],
        compressed=metrics["compressed"]["similarity"],
        compressed_saved=metrics["compressed"]["tokens_saved"],
    )


def _stated(counts: Mapping[str, int], how: str) -> str:
    """Values with their samples, for a cell of a table; what no record and no set states is said last."""
    named = [f"{_cell(value)} ({count:,})" for value, count in counts.items() if value]
    silent = counts.get("", 0)
    if not named:
        return "not stated by records or sets"
    return f"{how}: {', '.join(named)}" + (f"; {silent:,} not stated" if silent else "")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _row(rule: str, entry: Mapping[str, Any], bold: bool) -> str:
    kept = entry["quality_kept"]
    cells = [
        rule,
        f"{entry['threshold']:.6g}",
        f"{entry['share_compressed']:.1%}",
        f"{entry['tokens_saved']:.1%}",
        f"{entry['similarity']:.3f}",
        "-" if kept is None else f"{kept:.1%}",
        f"{entry['exact_match']:.1%}",
    ]
    return "| " + " | ".join(f"**{cell}**" if bold else cell for cell in cells) + " |"
