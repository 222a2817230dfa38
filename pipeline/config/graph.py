"""The stages, their order and what feeds what. Light: importing a stage's module must not import what it
runs with."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

from stages.stage_config import StageConfig
from vico.errors import UserError

SOURCES = ("records", "heldout", "tokenizer", "model", "repaired")
"""Inputs that come from outside the pipeline."""


@dataclass(frozen=True)
class StageSpec:
    """One stage: a module with CODE_VERSION, INPUTS, Config and run(config, context)."""

    name: str
    module_name: str

    @cached_property
    def module(self) -> ModuleType:
        return importlib.import_module(self.module_name)

    @property
    def code_version(self) -> int:
        return self.module.CODE_VERSION

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.module.INPUTS

    @property
    def config_class(self) -> type[StageConfig]:
        return self.module.Config

    @property
    def run(self) -> Callable:
        return self.module.run

    @property
    def needs_ray(self) -> bool:
        """A stage that only reads and writes tables says NEEDS_RAY = False; no Ray is started for it."""
        return getattr(self.module, "NEEDS_RAY", True)


class Graph:
    """Stages in the order they run. Raises ValueError when an input is unknown or comes later."""

    def __init__(self, stages: Sequence[StageSpec]):
        self.stages = tuple(stages)
        known = set(SOURCES)
        for spec in self.stages:
            if spec.name in known:
                raise ValueError(f"two stages or sources are named {spec.name!r}")
            missing = [name for name in spec.inputs if name not in known]
            if missing:
                raise ValueError(f"stage {spec.name!r} needs {missing}, which no earlier stage gives")
            known.add(spec.name)

    @property
    def names(self) -> list[str]:
        return [spec.name for spec in self.stages]

    def sources(self) -> set[str]:
        """The outside inputs that some stage reads."""
        return {name for spec in self.stages for name in spec.inputs} & set(SOURCES)

    def check_name(self, name: str, option: str) -> None:
        if name not in self.names:
            raise UserError(f"{option}={name!r} is no stage; the stages are {', '.join(self.names)}")

    def until(self, name: str | None) -> "Graph":
        """The stages up to and including this one."""
        if name is None:
            return self
        self.check_name(name, "--until")
        return Graph(self.stages[: self.names.index(name) + 1])

    def dependents(self, names: Sequence[str]) -> set[str]:
        """These stages and all that read what they give."""
        found = set(names)
        for spec in self.stages:
            if found.intersection(spec.inputs):
                found.add(spec.name)
        return found


def pipeline_graph() -> Graph:
    """The stages of vico."""
    names = ("shard", "consistency", "ratio", "label", "router", "evaluate", "export")
    return Graph([StageSpec(name, f"stages.{name}.stage") for name in names])
