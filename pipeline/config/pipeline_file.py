"""The pipeline file: seed, experiment, inputs and one block a stage, read and checked before anything
starts."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from cluster.passwords import places_of_passwords
from cluster.site import Site
from data_prep.records.config import RecordsConfig
from pipeline.config.errors import error_lines
from pipeline.config.graph import Graph
from pipeline.config.yaml_files import yaml_mapping, yaml_value
from stages.stage_config import StageConfig
from vico.checkpoints.hub import model_folder, pinned
from vico.errors import UserError


class Inputs(BaseModel):
    """What comes from outside: records, held-out records, and the model to start from, a folder or the id of
    one on the Hub."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    records: RecordsConfig
    heldout: RecordsConfig | None = None
    model: Path
    """A folder, or a Hub id: `owner/name` or `owner/name@revision`."""
    repaired: tuple[Path, ...] = ()
    """Files of repaired rows, each for the quarantine that those before it left (`vico data retry`)."""
    adopt: dict[str, Path] = {}
    """Stage -> folder with its result, made elsewhere: it is taken over by digest, the stage does not run."""

    @property
    def model_folder(self) -> Path:
        """Where the model's files lie on this machine; those of a Hub id are fetched where they are not yet.
        Errors of `vico.checkpoints.hub.model_folder`."""
        return self.model if self.model.is_absolute() else model_folder(str(self.model))


class PipelineConfig(BaseModel):
    """A pipeline file. The class that is read has one more field for each stage, by the stage's name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0)
    experiment: str = Field("vico", min_length=1)
    inputs: Inputs

    def stage(self, name: str) -> StageConfig:
        """The stage's config; where it draws and sets no seed of its own, with the pipeline's seed."""
        block: StageConfig = getattr(self, name)
        if "seed" in type(block).model_fields and block.seed is None:
            return block.model_copy(update={"seed": self.seed})
        return block

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults and seeds filled in, as JSON types."""
        content = self.model_dump(mode="json")
        for name in set(type(self).model_fields) - set(PipelineConfig.model_fields):
            content[name] = self.stage(name).model_dump(mode="json")
        return content


@cache
def config_class(graph: Graph) -> type[PipelineConfig]:
    """The pipeline file's form for these stages; a block may be left out where the stage needs nothing
    said."""
    fields: dict[str, Any] = {}
    for spec in graph.stages:
        required = any(field.is_required() for field in spec.config_class.model_fields.values())
        fields[spec.name] = (
            spec.config_class,
            Field(...) if required else Field(default_factory=spec.config_class),
        )
    return create_model("PipelineConfig", __base__=PipelineConfig, **fields)


def load_config(path: Path, graph: Graph, overrides: Sequence[str] = ()) -> PipelineConfig:
    """The pipeline file with `a.b=value` overrides applied; its paths come out absolute.

    Raises UserError with one line for each fault: dotted path, value, remedy.
    """
    content = yaml_mapping(path, "config")
    for override in overrides:
        _apply(content, override)
    secret = places_of_passwords(content)
    if secret:
        raise UserError(
            f"{secret[0]} holds a password, which every record of the run would keep; give the URL without "
            "it, and the password in the environment or the files that its library reads"
        )
    form = config_class(graph)
    try:
        # By way of JSON, since only there a strict check takes lists for tuples and text for paths.
        config = form.model_validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        raise UserError(error_lines(error, form)) from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; mend the YAML there") from error
    for stage in config.inputs.adopt:
        graph.check_name(stage, "inputs.adopt")
    _check_repaired(config.inputs, graph)
    return config.model_copy(update={"inputs": _with_absolute_paths(config.inputs)})


def _check_repaired(inputs: Inputs, graph: Graph) -> None:
    """A stage that is taken over does not run, so it would not see the repaired rows."""
    for spec in graph.stages:
        if inputs.repaired and spec.name in inputs.adopt and "repaired" in spec.inputs:
            raise UserError(
                f"inputs.repaired={', '.join(map(str, inputs.repaired))} has no effect while "
                f"inputs.adopt.{spec.name}={inputs.adopt[spec.name]} takes its result from elsewhere; "
                f"leave out inputs.repaired or inputs.adopt.{spec.name}"
            )


def _apply(content: dict[str, Any], override: str) -> None:
    """Put one `a.b=value` into the content; the value is read as YAML."""
    path, equals, text = override.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"--set {override!r} has no key and value; write it as --set shard.max_tiles=6")
    block = content
    for depth, name in enumerate(names[:-1], start=1):
        inner = block.get(name)
        if inner is None:
            inner = block[name] = {}
        if not isinstance(inner, dict):
            raise UserError(
                f"--set {override!r}: {'.'.join(names[:depth])}={inner!r} is no block of keys; set it itself"
            )
        block = inner
    block[names[-1]] = yaml_value(text, f"--set {override!r}")


def _with_absolute_paths(inputs: Inputs) -> Inputs:
    """Paths are meant relative to the working directory of the command; workers have another one."""

    def absolute(records: RecordsConfig | None) -> RecordsConfig | None:
        if records is None or records.path is None:
            return records
        return records.model_copy(
            update={"path": _absolute_text(records.path), "root": _absolute_text(records.root)}
        )

    return inputs.model_copy(
        update={
            "records": absolute(inputs.records),
            "heldout": absolute(inputs.heldout),
            "model": _model(inputs.model),
            "repaired": tuple(_absolute(path) for path in inputs.repaired),
            "adopt": {stage: _absolute(folder) for stage, folder in inputs.adopt.items()},
        }
    )


def _model(given: Path) -> Path:
    """The absolute path, or a Hub id with the commit that it stands for now, which a resumed, a submitted and
    a reproduced run take too. `owner` being a folder here, a path is meant."""
    hub_id = None if given.exists() or given.parent.exists() else pinned(str(given))
    return _absolute(given) if hub_id is None else Path(hub_id)


def _absolute_text(path: str | None) -> str | None:
    """A path made absolute; an address such as s3:// is that already."""
    return path if path is None or "://" in path else str(_absolute(Path(path)))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


def check_together(config: PipelineConfig, site: Site) -> None:
    """What only several blocks, or config and site, can know together: no training may have more ranks than
    packs in a step, and the oracle needs the ratio of every test tile it is asked about.
    """
    _check_oracle(getattr(config, "ratio", None), getattr(config, "evaluate", None))
    for name, block in config:
        packs = getattr(block, "packs_per_step", None)
        if packs is not None and site.resources.workers > packs:
            raise UserError(
                f"resources.workers={site.resources.workers} (site {site.name}) is more than "
                f"{name}.packs_per_step={packs}; "
                f"lower resources.workers or raise {name}.packs_per_step"
            )


def _check_oracle(ratio: Any, evaluate: Any) -> None:
    if ratio is None or evaluate is None or "oracle" not in getattr(evaluate, "controls", ()):
        return
    samples_covered = not ratio.max_samples or 0 < evaluate.max_samples <= ratio.max_samples
    if "test" not in ratio.splits or not samples_covered:
        raise UserError(
            "evaluate.controls names oracle, which needs the ratios of all test tiles, but ratio.splits="
            f"{','.join(ratio.splits)} and ratio.max_samples={ratio.max_samples} leave some out; take "
            "oracle out of evaluate.controls, or let ratio cover the test split"
        )


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A config as one level of text: `{"a": {"b": 1e-5}}` gives `{"a.b": "1e-05"}`."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return found
