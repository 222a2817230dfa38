"""The plan of a pipeline whose model has no weights here: what its config.json alone tells.

Fingerprints need the model's files, so they are unknown. Memory, disk and speed of the training are not:
`vico plan` answers on which site a model of tens of gigabytes could be trained before it is fetched.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.project import STARTER_FOLDER
from cluster.settings.yaml_files import yaml_mapping
from pipeline.config.dotted_keys import apply_override
from pipeline.config.graph import Graph
from pipeline.config.joint_checks import check_together
from pipeline.config.pipeline_file import PipelineConfig, config_with_faults
from pipeline.planning.estimates import StageEstimate, inference_of, limits_of, training_of
from pipeline.planning.plan import PlannedStage
from pipeline.planning.request import RunRequest
from vico.checkpoints.hub import config_folder, folder_here, hub_name
from vico.errors import Faults, UserError
from vico.model_files import model_config, weight_files

PUBLISHED = STARTER_FOLDER / "models" / "configs"
"""The config.json of published models, below their Hub ids: the project brings them along."""


@dataclass(frozen=True)
class PlanWithoutWeights:
    """What `vico plan` shows, and a line that says why it is not more."""

    planned: list[PlannedStage]
    estimates: dict[str, StageEstimate]
    note: str


def plan_without_weights(request: RunRequest, graph: Graph) -> PlanWithoutWeights | None:
    """Return the plan by the model's config.json alone.

    None if its weights are here, and for a model that does not exist, which the usual plan reports.

    Raises UserError for a faulty config, and for a model that is not supported.
    """
    model = _model_of(request)
    folder = None if model is None else _config_folder(model)
    if model is None or folder is None:
        return None
    faults = Faults()
    config = config_with_faults(request.config, graph, request.overrides, faults, pin_model=False)
    with faults.collected():
        check_together(config, request.site)
    faults.raise_all()
    names = config.stages_of(graph).until(request.until).names
    remedy = (
        "`vico run` fetches them from the Hub" if hub_name(model) else "copy them into the folder to run it"
    )
    return PlanWithoutWeights(
        planned=[
            PlannedStage(name, "run", "", ["fingerprint unknown without the model's files"]) for name in names
        ],
        estimates=_estimates(config, names, model_config(folder), request),
        note=f"{model}: no weights here, so the plan is by {folder / 'config.json'} alone; {remedy}",
    )


def _model_of(request: RunRequest) -> str | None:
    """Return `inputs.model` as the pipeline file and the overrides have it; None if it is not a text."""
    content = yaml_mapping(request.config, "config")
    try:
        for override in request.overrides:
            apply_override(content, override)
    except UserError:
        return None  # the usual plan reports it, together with other faults
    inputs = content.get("inputs")
    model = inputs.get("model") if isinstance(inputs, dict) else None
    return model if isinstance(model, str) else None


def known_config_folder(model: str) -> Path:
    """Return the folder with a model's config.json: its own, one that the project brings along, or from the
    Hub, of which nothing else is fetched. Without a config.json: a model that does not exist.

    Raises as `vico.checkpoints.hub.config_folder` does.
    """
    here, name = folder_here(model), hub_name(model)
    if (here / "config.json").is_file() or name is None:
        return here
    # Both layouts have the same sizes.
    bundled = PUBLISHED / name.removesuffix("-HF")
    return bundled if (bundled / "config.json").is_file() else config_folder(model)


def _config_folder(model: str) -> Path | None:
    """Return a folder with the config.json of a model without weights here; None if it has them, or does not
    exist."""
    folder = known_config_folder(model)
    return folder if (folder / "config.json").is_file() and not _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    try:
        return bool(weight_files(folder))
    except UserError:
        return True  # there are some, and the usual plan says what is wrong with them


def _estimates(
    config: PipelineConfig, names: list[str], model: Mapping[str, Any], request: RunRequest
) -> dict[str, StageEstimate]:
    estimates = {}
    for name in names:
        if name in config.inputs.adopt:
            continue
        block = config.stage(name)
        training = training_of(name, block, model, request.site, limits_of(config, request.site, name))
        inference = inference_of(name, block, model, request.site)
        if training is not None or inference is not None:
            estimates[name] = StageEstimate(None, None, None, "", inference, training)
    return estimates
