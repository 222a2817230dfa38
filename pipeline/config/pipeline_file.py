"""The pipeline file: seed, experiment, inputs and one block per stage, checked before anything starts."""

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from cluster.passwords import password_fields
from cluster.settings.yaml_files import yaml_mapping
from pipeline.config.dotted_keys import apply_override
from pipeline.config.errors import error_lines
from pipeline.config.graph import JOINT, JOINT_STAGES, Graph, block_path, with_joint
from pipeline.config.inputs import Inputs, check_inputs, with_absolute_paths
from pipeline.config.joint import fill_in_joint, is_taken_over, joint_field
from pipeline.config.quality_gate import QualityGate
from stages.stage_config import StageConfig
from vico.errors import Faults, UserError
from vico.shown_text import printable


class PipelineConfig(BaseModel):
    """A pipeline file. The class that is read has one more field per stage, named after the stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0)
    """The seed of every stage that draws random numbers and has no `seed` of its own in its block."""
    experiment: str = Field("vico", min_length=1)
    """The MLflow experiment of new runs, and a name for people. It does not enter any fingerprint."""
    quality_gate: QualityGate = QualityGate()
    """What the model must reach to become the candidate in MLflow's registry. It does not enter any
    fingerprint."""
    inputs: Inputs
    """What the pipeline reads: records and the model to start from."""

    @field_validator("experiment")
    @classmethod
    def _experiment_is_shown_as_it_is(cls, name: str) -> str:
        if printable(name) != name:
            raise ValueError(f"experiment={printable(name)!r} has control characters; leave them out")
        return name

    def stage(self, name: str) -> StageConfig:
        """Return the config of a stage."""
        block: Any = self
        for part in block_path(name):
            block = getattr(block, part)
        assert isinstance(block, StageConfig)
        return block

    @property
    def has_joint(self) -> bool:
        """Whether the pipeline has the joint stages."""
        return getattr(self, JOINT, None) is not None

    def stages_of(self, graph: Graph) -> Graph:
        """Return the graph of the stages that run: with the joint ones if they are on."""
        return with_joint(graph) if self.has_joint else graph

    def stage_configs(self) -> Iterator[tuple[str, StageConfig]]:
        """Yield name and config of every stage."""
        yield from ((name, block) for name, block in self if isinstance(block, StageConfig))
        if self.has_joint:
            yield from ((spec.name, self.stage(spec.name)) for spec in JOINT_STAGES)

    def resolved(self) -> dict[str, Any]:
        """Return everything, with defaults and seeds filled in, as JSON types."""
        return self.model_dump(mode="json")


@cache
def config_class(graph: Graph) -> type[PipelineConfig]:
    """Return the class of the pipeline file for these stages. A block without required
    fields may be left out."""
    fields: dict[str, Any] = {}
    for spec in graph.stages:
        required = any(field.is_required() for field in spec.config_class.model_fields.values())
        fields[spec.name] = (
            spec.config_class,
            Field(...) if required else Field(default_factory=spec.config_class),
        )
    return create_model("PipelineConfig", __base__=PipelineConfig, **fields, **joint_field(graph))


def load_config(path: Path, graph: Graph, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Return the pipeline file with the `a.b=value` overrides applied and its paths made absolute.

    Raises UserError with one line per fault: dotted path, value, remedy.
    """
    faults = Faults()
    config = config_with_faults(path, graph, overrides, faults)
    faults.raise_all()
    return config


def config_with_faults(
    path: Path, graph: Graph, overrides: Sequence[str], faults: Faults, *, pin_model: bool = True
) -> PipelineConfig:
    """Return the config of `load_config` without the keys at fault, which are noted in `faults`.

    So that the checks of later steps find their faults too. Without `pin_model` the Hub is not asked for the
    commit of the model. Raises UserError if nothing is left to check.
    """
    content = yaml_mapping(path, "config")
    for override in overrides:
        with faults.collected():
            apply_override(content, override)
    _refuse_passwords(content)
    own_joint = deepcopy(content.get(JOINT))
    _fill_in_seeds(content, graph)
    fill_in_joint(content)
    form = config_class(graph)
    try:
        config = _checked(form, content)
    except ValidationError as error:
        faults.note(error_lines(error, form, lambda location: is_taken_over(location, own_joint)))
        for details in error.errors():
            _leave_out(content, details["loc"])
        try:
            config = _checked(form, content)
        except ValidationError:
            faults.raise_all()
            raise
    except ValueError as error:
        raise UserError(f"{path}: {error}; fix the YAML there") from error
    with faults.collected():
        check_inputs(config.inputs, config.stages_of(graph))
    return config.model_copy(update={"inputs": with_absolute_paths(config.inputs, pin_model=pin_model)})


def _checked(form: type[PipelineConfig], content: dict[str, Any]) -> PipelineConfig:
    # By way of JSON, since only there a strict check takes lists for tuples and text for paths.
    return form.model_validate_json(json.dumps(content, default=str), strict=True)


def _leave_out(content: dict[str, Any], location: Sequence[int | str]) -> None:
    """Delete the key at this path; of a fault inside a list, the whole list."""
    block = content
    for position, key in enumerate(location):
        is_last = position + 1 == len(location) or isinstance(location[position + 1], int)
        if not isinstance(block, dict) or key not in block:
            return
        if is_last or not isinstance(block[key], dict):
            del block[key]
            return
        block = block[key]


def _refuse_passwords(content: dict[str, Any]) -> None:
    keys = password_fields(content)
    if keys:
        raise UserError(
            f"{keys[0]} holds a password, which every record of the run would keep; give the URL without "
            "it, and the password in the environment or the files that its library reads"
        )


def _fill_in_seeds(content: dict[str, Any], graph: Graph) -> None:
    """Give the pipeline's seed to every stage that has a seed and does not set it.

    A wrong seed is refused as the pipeline's, not once more for every stage.
    """
    seed = content.get("seed", 0)
    seed = max(seed, 0) if isinstance(seed, int) and not isinstance(seed, bool) else 0
    for spec in graph.stages:
        if "seed" not in spec.config_class.model_fields:
            continue
        block = content.get(spec.name, {})
        if isinstance(block, dict) and block.get("seed") is None:
            content[spec.name] = {**block, "seed": seed}
