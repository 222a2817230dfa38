"""The export stage: one model folder with both connectors, the router and its threshold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from data_prep.shards.names import MANIFEST_FILE
from stages.context import Context
from stages.export.config import ExportConfig
from stages.export.model_card import CARD_FILE, CardSources, model_card
from stages.export.start_model import start_model, stated_licence
from stages.export.thresholds import write_thresholds
from stages.outputs import METRICS_FILE, MODEL_FOLDER, POLICY_FOLDER, ROUTER_FILE

CODE_VERSION = 8
INPUTS = ("shard", "model", "consistency", "router", "evaluate")
NEEDS_RAY = False
Config = ExportConfig


def run(config: ExportConfig, context: Context) -> dict[str, float | int | str]:
    """Publish `model/`, the trained policy with its router, as one part."""
    threshold = _json(context.folder("evaluate") / METRICS_FILE)["absolute_threshold"]
    if not context.parts.done(MODEL_FOLDER):
        folder = context.parts.partial(MODEL_FOLDER)
        shutil.rmtree(folder, ignore_errors=True)
        write_model(context, folder, threshold)
        context.parts.publish(MODEL_FOLDER)
    size = sum(path.stat().st_size for path in (context.parts.output / MODEL_FOLDER).iterdir())
    model = context.folder("model")
    base = {"base_model": model.resolve().name, "base_licence": stated_licence(model)}
    return {"bytes": size, "absolute_threshold": threshold, **base}


def write_model(context: Context, folder: Path, threshold: float) -> None:
    """Write the policy with the router's tensors, the threshold in config.json, a model card and the table of
    thresholds."""
    from vico.checkpoints.write import write_hf_folder

    folder.mkdir()
    policy = context.folder("consistency") / POLICY_FOLDER
    router_file = context.folder("router") / ROUTER_FILE
    write_hf_folder(policy, folder, router_file=router_file, absolute_threshold=threshold)
    sources = CardSources(
        start=start_model(context.folder("model")),
        manifest=_json(context.folder("shard") / MANIFEST_FILE),
        evaluation=_json(context.folder("evaluate") / METRICS_FILE),
        router=_json(context.folder("router") / METRICS_FILE),
    )
    (folder / CARD_FILE).write_text(model_card(sources), encoding="utf-8")
    write_thresholds(folder, sources.evaluation)


def _json(path: Path) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        return json.load(file)
