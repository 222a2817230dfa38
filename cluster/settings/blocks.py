"""The smaller blocks of a site file; `train` and those of one kind of site are in files of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

Kind = Literal["local", "ray", "kuberay", "slurm"]
GROUP_RESOURCE = "vico_"
_JOINT = "joint_"  # the beginning of the names of stages that repeat another one
_TRAININGS = ("consistency", "router")
"""Ray resource `vico_NAME` marks the nodes of group NAME; each node has 1 of it."""
_GROUP_SHARE = 0.001  # a node of a group takes up to 1000 processes


class SiteBlock(BaseModel):
    """What all blocks of a site file share: frozen, no unknown key, no nan or inf."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` and `yes` where a number belongs; pydantic takes them for 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and _is_number(kind):
            raise PydanticCustomError("number_type", "Input should be a number, not true or false")
        return value


def _is_number(kind: Any) -> bool:
    """Return whether an annotation allows numbers and no booleans: `int | None`, `Literal[1, 2, 3]`."""
    kinds = (kind, *get_args(kind))
    return bool not in kinds and any(part in (int, float) or isinstance(part, int) for part in kinds)


class RaySettings(SiteBlock):
    """Which Ray to use: the cluster at `address`, or without one a local Ray that ends with the command."""

    address: str | None = None
    """Ray cluster to join: `auto` or HOST:PORT; null: start a local Ray."""
    num_cpus: int = Field(2, ge=1)
    """Number of CPUs that a local Ray gives out."""
    temp_dir: Path | None = None
    """Folder in which a local Ray gets a new folder for its sockets and logs; null: the system's temporary
    folder."""
    start_timeout_s: float = Field(120, gt=0)
    """Seconds that each process of a local Ray may take to start; busy machines and slow disks need more."""
    # Measured: without the dashboard a local Ray starts 2 s sooner and takes 870 MB less memory.
    dashboard: bool = False
    """Start Ray's dashboard with a local Ray. It costs 2 s at the start and 870 MB of memory."""
    dashboard_port: int | None = Field(None, ge=1, le=65535)
    """Port of the dashboard; null: the first free port from 8265 on."""

    @model_validator(mode="after")
    def settings_take_effect(self) -> RaySettings:
        if self.dashboard_port is not None and not self.dashboard:
            raise ValueError(
                f"ray.dashboard_port={self.dashboard_port} has no effect while ray.dashboard is false; "
                "set ray.dashboard: true or ray.dashboard_port: null"
            )
        return self


class NodeGroup(SiteBlock):
    """Nodes of one kind: those of the cluster, or those to ask KubeRay or Slurm for."""

    name: str
    """Name of the group, to which `resources.nodes` refers: lower-case letters, digits and -."""
    count: int = Field(1, ge=1)
    """Number of nodes."""
    cpus: int = Field(ge=1)
    """CPUs per node."""
    gpus: int = Field(0, ge=0)
    """GPUs per node."""
    memory_gib: float | None = Field(None, ge=0.5)
    """Host memory per node in GiB; null: what the scheduler gives. KubeRay needs it."""
    selector: dict[str, str] = {}
    """KubeRay: labels that a node must have (`nodeSelector`)."""
    tolerations: list[dict[str, Any]] = []
    """KubeRay: taints that the pods accept, passed on as they are."""

    @field_validator("name")
    @classmethod
    def name_fits_ray_and_kubernetes(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
            raise ValueError(
                f"nodes: name={name!r} is not a name of a group; use at most 40 lower-case letters, digits "
                "and -, with a letter first"
            )
        return name

    @property
    def resource(self) -> str:
        """Return the Ray resource that marks the nodes of this group."""
        return GROUP_RESOURCE + self.name


class StageResources(SiteBlock):
    """What one stage uses instead of the values in `resources`; null: the value there."""

    workers: int | None = Field(None, ge=1)
    """Number of ranks of a training."""
    actors: int | None = Field(None, ge=1)
    """Number of copies of a model in stages that only run it."""
    tasks: int | None = Field(None, ge=1)
    """Number of shards that are written or read at the same time."""
    threads_per_worker: int | None = Field(None, ge=1)
    """CPUs and threads per worker, actor or task."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs per worker or actor."""
    nodes: str | None = None
    """Group of nodes that the stage's processes run on."""
    gpu_memory_gb: float | None = Field(None, gt=0)
    """Memory of one of their GPUs in GB."""


class Resources(SiteBlock):
    """How many processes work at the same time, and what each of them takes."""

    workers: int = Field(2, ge=1)
    """Number of ranks of a training."""
    actors: int = Field(2, ge=1)
    """Number of copies of a model in stages that only run it."""
    tasks: int = Field(2, ge=1)
    """Number of shards that are written or read at the same time."""
    threads_per_worker: int = Field(1, ge=1)
    """CPUs and threads per worker, actor or task."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs per worker or actor: 1 puts ranks and models on GPUs, 0 on CPUs whatever the nodes have.
    Stages that only run a model also accept a share of a GPU, such as 0.5. Tasks (the shard stage) use none;
    set 0 in `resources.stages.shard` if they have nodes without GPUs."""
    nodes: str | None = None
    """Name of the group in `nodes` that processes run on, by its Ray resource `vico_NAME`; null: any node."""
    gpu_memory_gb: float | None = Field(None, gt=0)
    """Memory of one GPU in GB, such as 80. With it, a training that would not fit is refused before it
    starts, with a setting that fits; null: it is not checked."""
    stages: dict[str, StageResources] = {}
    """Stage -> what it uses instead: CPU nodes to write shards, many small actors for losses, GPU nodes to
    train. A joint stage such as `joint_ratio` without a block of its own uses that of `ratio`."""
    max_retries: int = Field(2, ge=0)
    """Number of retries of an item after the process that worked on it died."""

    @property
    def per_process(self) -> dict[str, float]:
        """Return what Ray reserves for one worker, actor or task."""
        reserved: dict[str, float] = {"CPU": self.threads_per_worker}
        if self.gpus_per_worker:
            reserved["GPU"] = self.gpus_per_worker
        return {**reserved, **self.placement}

    @property
    def placement(self) -> dict[str, float]:
        """Return the Ray resource that keeps a process on the nodes of its group."""
        return {GROUP_RESOURCE + self.nodes: _GROUP_SHARE} if self.nodes else {}

    @property
    def any_gpus(self) -> bool:
        """Return whether any stage uses GPUs."""
        return any(resources.gpus_per_worker > 0 for resources in self.every)

    @property
    def every(self) -> list[Resources]:
        """Return the resources of stages without a block of their own, then those of the others."""
        return [self, *(self.of_stage(stage) for stage in self.stages)]

    @property
    def of_trainings(self) -> list[Resources]:
        """Return those of `every` whose `workers` are ranks; other stages only inherit the number."""
        return [self, *(self.of_stage(stage) for stage in self.stages if self.has_ranks(stage))]

    def has_ranks(self, stage: str) -> bool:
        """Return whether a stage with a block of its own trains, or whether that block sets `workers`."""
        return stage.removeprefix(_JOINT) in _TRAININGS or self.stages[stage].workers is not None

    def of_stage(self, stage: str) -> Resources:
        """Return the resources of one stage."""
        own = self._own(stage)[1]
        changed = {} if own is None else own.model_dump(exclude_none=True)
        return self.model_copy(update={**changed, "stages": {}}) if changed else self

    def field_of(self, stage: str, name: str) -> str:
        """Return the path of the field in the site file that gives a stage its value of `name`."""
        block, own = self._own(stage)
        is_own = own is not None and getattr(own, name) is not None
        return f"resources.stages.{block}.{name}" if is_own else f"resources.{name}"

    def _own(self, stage: str) -> tuple[str, StageResources | None]:
        """Return name and content of a stage's block. A joint stage without a block uses the block of the
        first stage of its kind."""
        name = stage if stage in self.stages else stage.removeprefix(_JOINT)
        return name, self.stages.get(name)


class Inference(SiteBlock):
    """How much a model processes at the same time in stages that only run it."""

    row_tokens: int = Field(4096, ge=1)
    """Tokens per packed row; a longer sample gets a row to itself."""
    generation_tokens: int = Field(16384, ge=1)
    """Tokens per padded batch of prompts, including room for their answers."""
    batch_tiles: int = Field(32, ge=1)
    """Tiles that go through the vision tower together."""


class Tracking(SiteBlock):
    """Where MLflow keeps what runs report to it."""

    enabled: bool = True
    """Report runs to MLflow."""
    uri: str | None = None
    """Address of MLflow, such as http://HOST:PORT; null: an sqlite database in the storage folder."""
    artifacts: str | None = None
    """Folder or URI for artifacts; null: with an sqlite database `mlartifacts` in the storage folder (with an
    object store: beside the database), otherwise the server's own."""
    tensorboard: bool = False
    """Also write event files for TensorBoard to runs/<run>/tensorboard in the storage: `tensorboard --logdir
    STORAGE/runs` shows them."""
    system_metrics: bool = True
    """Also send CPU, memory, network and GPUs of every node to MLflow; files of the run have them anyway."""
    interval_s: float = Field(2.0, gt=0)
    """Seconds between two transfers of metrics to MLflow."""
    finish_timeout_s: float = Field(60.0, gt=0)
    """Seconds that the end of a run, or an audit that sends what MLflow lacks, waits for MLflow to take the
    rest."""


class DriverResources(SiteBlock):
    """What Ray reserves for the driver of a submitted run. Nothing: the driver runs on the head node."""

    cpus: float = Field(0, ge=0)
    """CPUs of the driver."""
    memory_gib: float = Field(0, ge=0)
    """Memory of the driver in GiB; kind `ray` only."""
    custom: dict[str, float] = {}
    """Other Ray resources, such as `vico_cpu: 0.001` to run on a node of the group `cpu`."""


class Metrics(SiteBlock):
    """Prometheus metrics of a run, served by its driver."""

    port: int | None = Field(None, ge=1, le=65535)
    """Port on the driver's machine that answers GET /metrics; null: none."""
    host: str = "0.0.0.0"
    """Address to listen on; 127.0.0.1 keeps other machines out."""


class Jobs(SiteBlock):
    """How `vico submit` sends a run to the site, whatever its kind."""

    address: str | None = None
    """Kind `ray`: address of the Ray Jobs server, such as http://HOST:8265; null: no `vico submit`."""
    python: str = "python"
    """The interpreter on the cluster in which this project's dependencies are installed."""
    code: Literal["archive", "installed"] = "archive"
    """Where the job's code comes from: `archive` sends the sources of this machine, whose digest every record
    has; `installed` uses the vico that is installed there, as a wheel or in an image."""
    restarts: int = Field(2, ge=0)
    """Number of times that a job starts its driver again after the driver's process died (out of memory,
    SIGKILL, crash). A driver that ends by itself, even with an error, is not started again: see `retries`."""
    restart_pause_s: float = Field(10, ge=0)
    """Seconds before a dead driver starts again."""
    driver: DriverResources = DriverResources()


class Retries(SiteBlock):
    """How often the same command starts a failed stage again, by kind of failure, counted over the whole run.

    A failure that only the user can fix (bad input, a full disk) is never retried. Before that, workers are
    replaced within the stage: see `resources.max_retries` and `train.restarts.max_failures`.
    """

    worker: int = Field(0, ge=0)
    """Retries after a process or node died for good, or a rank ended in an error."""
    io: int = Field(0, ge=0)
    """Retries after a file system or a connection failed."""
    memory: int = Field(0, ge=0)
    """Retries after host or device memory ran out."""
    error: int = Field(0, ge=0)
    """Retries after any other error raised by code."""
    pause_s: float = Field(30, ge=0)
    """Seconds to wait before the stage starts again."""


class Hook(SiteBlock):
    """A program and a web address that are notified when a command on a run has ended, however it ended."""

    command: list[str] = []
    """Program and arguments to run; it gets JSON on standard input. Empty: none."""
    url: str | None = Field(None, pattern=r"^https?://[^/]+")
    """Address that gets the same JSON as a POST; null: none."""
    timeout_s: float = Field(30, gt=0)
    """Seconds after which the program or the request is given up."""
