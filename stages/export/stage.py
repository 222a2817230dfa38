"""The export stage: one model folder in Hugging Face layout with both connectors, the router and its
threshold.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from stages.context import Context
from stages.export.model_card import model_card, stated_licence
from stages.outputs import MODEL_FOLDER, POLICY_FOLDER, ROUTER_FILE
from stages.stage_config import StageConfig

CODE_VERSION = 3
INPUTS = ("shard", "model", "consistency", "router", "evaluate")
NEEDS_RAY = False


class ExportConfig(StageConfig):
    """Config of the export stage; nothing to choose yet."""


Config = ExportConfig


def run(config: ExportConfig, context: Context) -> dict[str, float | int | str]:
    """Publishes `model/`, the trained policy with its router, whole or not at all."""
    threshold = _json(context.inputs["router"] / "metrics.json")["absolute_threshold"]
    if not context.parts.done(MODEL_FOLDER):
        folder = context.parts.partial(MODEL_FOLDER)
        shutil.rmtree(folder, ignore_errors=True)
        write_model(context, folder, threshold)
        context.parts.publish(MODEL_FOLDER)
    size = sum(path.stat().st_size for path in (context.parts.output / MODEL_FOLDER).iterdir())
    return {"bytes": size, "absolute_threshold": threshold}


def write_model(context: Context, folder: Path, threshold: float) -> None:
    """The policy's folder with the router's tensors, the threshold in config.json under `vico`, and a model
    card.
    """
    from vico.checkpoints.write import write_hf_folder

    folder.mkdir()
    policy, router_file = (
        context.inputs["consistency"] / POLICY_FOLDER,
        context.inputs["router"] / ROUTER_FILE,
    )
    write_hf_folder(policy, folder, router_file=router_file, absolute_threshold=threshold)
    card = model_card(
        base=weights_digest(context.inputs["model"]),
        licence=stated_licence(context.inputs["model"]),
        data=_json(context.inputs["shard"] / "manifest.json"),
        metrics=_json(context.inputs["evaluate"] / "metrics.json"),
        router=_json(context.inputs["router"] / "metrics.json"),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def weights_digest(folder: Path) -> tuple[str, str]:
    """(name of the model folder, sha256 over its weight files in their order)."""
    from vico.settings import weight_files

    digest = hashlib.sha256()
    for path in weight_files(folder):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return folder.resolve().name, digest.hexdigest()


def _json(path: Path) -> dict:
    with open(path, encoding="utf-8") as file:
        return json.load(file)
