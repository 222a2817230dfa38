"""The stages of a pipeline, their order, and which stage reads which.

This file stays light: importing a stage's module must not import the libraries that the stage runs with.
"""

import importlib
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, cast

from stages.stage_config import StageConfig
from vico.errors import UserError

if TYPE_CHECKING:
    from stages.context import Context

JOINT = "joint"
"""The block of the pipeline file that switches the joint stages on, and has their blocks."""
_JOINT_PREFIX = f"{JOINT}_"
SOURCES: tuple[str, ...] = ("records", "heldout", "tokenizer", "model", "repaired")
"""Inputs that come from outside the pipeline."""
MODEL_SOURCES: tuple[str, ...] = ("model", "tokenizer")
"""The sources that are the model folder: all of it, or only its tokenizer and image settings."""

RunStage = Callable[[Any, "Context"], Mapping[str, float | int | str]]
"""(config, context) -> counts for the record. The config is an instance of the module's own `Config`."""


class StageModule(Protocol):
    """The names that every stage's module defines."""

    @property
    def CODE_VERSION(self) -> int:
        """Enters the fingerprint; raised when an edit changes the stage's results."""

    @property
    def INPUTS(self) -> tuple[str, ...]:
        """Sources and earlier stages that the stage reads."""

    @property
    def NEEDS_RAY(self) -> bool:
        """False for a stage that only reads and writes tables; no Ray is started for it."""

    @property
    def Config(self) -> type[StageConfig]:
        """The class of the stage's block in the pipeline file."""

    @property
    def run(self) -> RunStage:
        """Run the stage and return its counts."""


@dataclass(frozen=True)
class StageSpec:
    """One stage: its name, and the module that is imported when something of it is first needed."""

    name: str
    module_name: str
    replaced: tuple[tuple[str, str], ...] = ()
    """(input of the module, stage that gives it) for inputs that another stage gives than the one of that
    name."""

    @cached_property
    def module(self) -> StageModule:
        return cast(StageModule, importlib.import_module(self.module_name))  # import_module knows no types

    @property
    def code_version(self) -> int:
        return self.module.CODE_VERSION

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the sources and stages that it reads."""
        return tuple(self.givers.values())

    @property
    def givers(self) -> dict[str, str]:
        """Return input of the module -> source or stage that gives it."""
        replaced = dict(self.replaced)
        return {name: replaced.get(name, name) for name in self.module.INPUTS}

    @property
    def config_class(self) -> type[StageConfig]:
        return self.module.Config

    @property
    def run(self) -> RunStage:
        return self.module.run

    @property
    def needs_ray(self) -> bool:
        return self.module.NEEDS_RAY


class Graph:
    """Stages in the order they run. Raises ValueError when an input is unknown or comes later."""

    def __init__(self, stages: Sequence[StageSpec]):
        self.stages = tuple(stages)
        available = set(SOURCES)
        for spec in self.stages:
            if spec.name in available:
                raise ValueError(f"two stages or sources are named {spec.name!r}")
            missing = [name for name in spec.inputs if name not in available]
            if missing:
                raise ValueError(f"stage {spec.name!r} needs {missing}, which no earlier stage gives")
            available.add(spec.name)

    @property
    def names(self) -> list[str]:
        return [spec.name for spec in self.stages]

    def sources(self) -> set[str]:
        """Return the sources that at least one stage reads."""
        return {name for spec in self.stages for name in spec.inputs} & set(SOURCES)

    def check_name(self, name: str, option: str) -> None:
        """Raise UserError, naming the option, if no stage has this name."""
        if name in self.names:
            return
        if name in (spec.name for spec in JOINT_STAGES):
            raise UserError(
                f"{option}={name!r} is a stage only if {JOINT} is on; set {JOINT}: {{}} in the pipeline "
                f"file, or name one of {', '.join(self.names)}"
            )
        raise UserError(f"{option}={name!r} is not a stage; the stages are {', '.join(self.names)}")

    def until(self, name: str | None) -> "Graph":
        """Return the graph up to and including this stage; None keeps all stages."""
        if name is None:
            return self
        self.check_name(name, "--until")
        return Graph(self.stages[: self.names.index(name) + 1])

    def dependents(self, names: Sequence[str]) -> set[str]:
        """Return these stages and every stage that reads their outputs, directly or not."""
        dependents = set(names)
        for spec in self.stages:
            if dependents.intersection(spec.inputs):
                dependents.add(spec.name)
        return dependents


def pipeline_graph() -> Graph:
    """Return the graph of the stages that every pipeline of vico has."""
    names = ("shard", "consistency", "ratio", "label", "router", "evaluate", "export")
    return Graph([StageSpec(name, f"stages.{name}.stage") for name in names])


JOINT_STAGES = (
    StageSpec("joint_rates", "stages.rates.stage"),
    StageSpec("joint_consistency", "stages.consistency.joint_stage", (("rates", "joint_rates"),)),
    StageSpec("joint_ratio", "stages.ratio.stage", (("consistency", "joint_consistency"),)),
    StageSpec("joint_label", "stages.label.stage", (("ratio", "joint_ratio"),)),
    StageSpec(
        "joint_router",
        "stages.router.stage",
        (("consistency", "joint_consistency"), ("label", "joint_label")),
    ),
)
"""Consistency training at the router's rates, then losses, labels and router once more: stages of their own,
with the code of the first ones and other inputs."""


def with_joint(graph: Graph) -> Graph:
    """Return the graph with the joint stages after the router; the stages after it then read their outputs.

    Raises UserError for a graph without a router.
    """
    if "router" not in graph.names:
        raise UserError(
            f"{JOINT} needs the stage router, whose rates it trains with, and the stages are "
            f"{', '.join(graph.names)}; leave {JOINT} out"
        )
    end = graph.names.index("router") + 1
    joint = {spec.name.removeprefix(_JOINT_PREFIX): spec.name for spec in JOINT_STAGES}
    later = [
        replace(spec, replaced=tuple((name, joint[name]) for name in spec.inputs if name in joint))
        for spec in graph.stages[end:]
    ]
    return Graph([*graph.stages[:end], *JOINT_STAGES, *later])


def last_of(stages: Container[str], name: str) -> str:
    """Return which of a run's stages gives the exported result of this kind: the joint one if there is
    one."""
    joint = _JOINT_PREFIX + name
    return joint if joint in stages else name


def block_path(stage: str) -> tuple[str, ...]:
    """Return where the block of a stage is in the pipeline file: `joint_ratio` has its in `joint.ratio`."""
    if stage.startswith(_JOINT_PREFIX):
        return JOINT, stage.removeprefix(_JOINT_PREFIX)
    return (stage,)


def block_of(config: Mapping[str, Any], stage: str) -> Mapping[str, Any]:
    """Return the block of a stage in a resolved config; empty if it has none."""
    block: Any = config
    for name in block_path(stage):
        block = (block or {}).get(name)
    return block or {}
