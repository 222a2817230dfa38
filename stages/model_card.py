"""README.md of an exported model: where it comes from, and what each threshold costs and saves."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_CARD = """\
---
library_name: vico
pipeline_tag: image-text-to-text
---

# An InternVL with a router over its tiles

Each tile of a picture takes {tokens_full} visual tokens, or {tokens_compressed} where the router finds it
simple. The folder is in Hugging Face layout; beside the tensors of transformers' InternVL it holds
`compressed_connector.*` and `router.*`. `vico.checkpoints.load_model(folder)` opens it, `vico route` shows
its decisions on a picture.

| | |
|---|---|
| base model | {base_name}, sha256 of its weights `{base_digest}` |
| data | {samples} samples in {shards} shards, sha256 over those of the shards `{data_digest}` |
| method | ViCO: consistency training against the base model, then a router trained on loss ratios |
| router on test tiles | AUC {auc}, {num_test} tiles |

## Thresholds

A tile is compressed where the router's probability of *compress* is at least the threshold; `config.json`
holds the calibrated one ({threshold:.6g}) as `vico.absolute_threshold`. Measured on {num_samples} test
samples that no stage trained or calibrated on. Similarity is ANLS with cut 0.5; kept is its share of the base
model's, which is {reference_similarity:.3f}.

| threshold | tiles compressed | tokens saved | similarity | kept | exact match |
|---:|---:|---:|---:|---:|---:|
{rows}

The calibrated threshold is in bold. All tiles full: similarity {full:.3f}. All compressed: {compressed:.3f}
with {compressed_saved:.1%} of tokens saved.
"""


def model_card(
    base: tuple[str, str], data: Mapping[str, Any], metrics: Mapping[str, Any], router: Mapping[str, Any]
) -> str:
    """Markdown from the base model's name and digest, the shards' manifest and the metrics of evaluate and
    router.
    """
    threshold = router["absolute_threshold"]
    shards = [shard["sha256"] for shard in data["shards"]]
    sizes = metrics["tokens_a_tile"]
    return _CARD.format(
        tokens_full=sizes["full"],
        tokens_compressed=sizes["compressed"],
        base_name=base[0],
        base_digest=base[1],
        samples=f"{data['written']:,}",
        shards=len(shards),
        data_digest=hashlib.sha256(json.dumps(shards).encode()).hexdigest(),
        auc="not defined" if router["auc"] is None else f"{router['auc']:.3f}",
        num_test=f"{router['num_test']:,}",
        threshold=threshold,
        num_samples=f"{metrics['num_samples']:,}",
        reference_similarity=metrics["reference"]["similarity"],
        rows="\n".join(_row(entry, entry["threshold"] == threshold) for entry in metrics["routed"]),
        full=metrics["full"]["similarity"],
        compressed=metrics["compressed"]["similarity"],
        compressed_saved=metrics["compressed"]["tokens_saved"],
    )


def _row(entry: Mapping[str, Any], bold: bool) -> str:
    kept = entry["quality_kept"]
    cells = [
        f"{entry['threshold']:.6g}",
        f"{entry['share_compressed']:.1%}",
        f"{entry['tokens_saved']:.1%}",
        f"{entry['similarity']:.3f}",
        "-" if kept is None else f"{kept:.1%}",
        f"{entry['exact_match']:.1%}",
    ]
    return "| " + " | ".join(f"**{cell}**" if bold else cell for cell in cells) + " |"
