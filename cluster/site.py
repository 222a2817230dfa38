"""Where a pipeline runs: the fields of a site file, which `cluster/site_files.py` reads.

Nothing here changes a result or enters a fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from cluster.passwords import without_passwords


class SitePart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RaySettings(SitePart):
    """Which Ray: the cluster at `address`, or without one a local one that lives as long as the command."""

    address: str | None = None
    num_cpus: int = Field(2, ge=1)
    temp_dir: Path | None = None
    """In which a local Ray gets a fresh folder for its sockets and logs; null: the system's temporary one."""
    # Without the dashboard a local Ray starts 2 s sooner and takes 870 MB less memory.
    dashboard: bool = False
    dashboard_port: int | None = Field(None, ge=1, le=65535)

    @model_validator(mode="after")
    def settings_take_effect(self) -> RaySettings:
        if self.dashboard_port is not None and not self.dashboard:
            raise ValueError(
                f"ray.dashboard_port={self.dashboard_port} has no effect while ray.dashboard is false; "
                "set ray.dashboard: true or ray.dashboard_port: null"
            )
        return self


class Resources(SitePart):
    """How many processes work at once, and what each of them takes."""

    workers: int = Field(2, ge=1)
    """Ranks of a training."""
    actors: int = Field(2, ge=1)
    """Copies of a model in stages that only run it."""
    tasks: int = Field(2, ge=1)
    """Shards worked on at once."""
    threads_per_worker: int = Field(1, ge=1)
    gpus_per_worker: float = Field(0, ge=0)
    max_retries: int = Field(2, ge=0)
    """How often an item is tried again after the process that worked on it died."""

    @property
    def per_process(self) -> dict[str, float]:
        """What Ray reserves for one worker, actor or task."""
        reserved: dict[str, float] = {"CPU": self.threads_per_worker}
        if self.gpus_per_worker:
            reserved["GPU"] = self.gpus_per_worker
        return reserved


class TrainSettings(SitePart):
    """How a training uses the machine."""

    zero_stage: Literal[1, 2, 3] = 2
    activation_checkpointing: bool = False
    compile: bool = False
    """Layers compiled by torch: faster on CUDA, with some minutes for the compiler at a first start; not with
    ZeRO-3 or activation checkpointing."""
    kl_chunk_rows: int = Field(256, ge=1)
    data_threads: int = Field(2, ge=1)
    """Threads of each rank that decode the coming step's pictures beside the training."""
    checkpoint_every_steps: int = Field(20, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    max_failures: int = Field(2, ge=0)
    """How often all ranks start again after one died or hung."""
    max_preemptions: int = Field(100, ge=0)
    """How often they start again after a rank got SIGTERM; their checkpoint is published before."""
    start_timeout_s: float = Field(3600, gt=0)
    """How long a start of the ranks waits for places in the cluster, after a node was lost too."""
    hang_timeout_s: float = Field(1800, gt=0)
    """A rank that ends no step for so long leaves its stacks and ends."""
    loss_spike_factor: float = Field(10, gt=1)
    """A loss over so many times the median of the last 50 counts as a spike."""
    max_loss_spikes: int | None = Field(None, ge=0)
    """null: spikes are counted only."""
    max_skipped_steps: int | None = Field(None, ge=0)
    """Updates that may be left out because their gradient is not finite; null: the first one stops all."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lies in host memory; parameters (with the optimizer) under ZeRO-3 only."""
    reference: Literal["replicated", "sharded", "cpu"] = "replicated"
    """A copy on every rank, spread over the ranks, or spread and in host memory."""
    profile: bool = False
    """Splits the time of a step into its parts; on CUDA it waits for the device at each, which costs time."""
    trace_steps: tuple[int, int] | None = None
    """First and last update, counted from 1, that torch's profiler records; null: none."""
    throughput_steps: int = Field(0, ge=0)
    """So many updates are measured before a training begins (and forgotten); 0: none."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one device in the training's dtype, dense; null: no share of it (`mfu`) is reported."""
    deepspeed: dict[str, Any] = {}
    """A DeepSpeed config merged under ours; keys that change the result are refused."""

    @property
    def collective_timeout_s(self) -> float:
        """How long a rank waits for the others: the watchdog, which says who hung where, comes before."""
        return self.hang_timeout_s + 60

    @model_validator(mode="after")
    def layers_can_be_compiled(self) -> TrainSettings:
        others = (
            ("activation_checkpointing", self.activation_checkpointing, False),
            ("zero_stage", self.zero_stage, 2 if self.zero_stage == 3 else self.zero_stage),
            ("reference", self.reference, "replicated"),
        )
        for field, value, needed in others:
            if self.compile and value != needed:
                raise ValueError(
                    f"train.compile=true does not go with train.{field}={json.dumps(value)}; set "
                    f"train.compile: false, or {field}: {json.dumps(needed)}"
                )
        return self

    @model_validator(mode="after")
    def trace_has_steps(self) -> TrainSettings:
        if self.trace_steps is not None and not 1 <= self.trace_steps[0] <= self.trace_steps[1]:
            raise ValueError(
                f"train.trace_steps={list(self.trace_steps)} is no range of updates; give the first and the "
                "last one, counted from 1, such as [5, 6]"
            )
        return self


class Inference(SitePart):
    """How much a model that only runs takes at once."""

    row_tokens: int = Field(4096, ge=1)
    """Tokens of a packed row; a longer sample has a row to itself."""
    generation_tokens: int = Field(16384, ge=1)
    """Tokens of a padded batch of prompts, room for their answers included."""
    batch_tiles: int = Field(32, ge=1)
    """Tiles that go through the vision tower at once."""


class Tracking(SitePart):
    """Where MLflow keeps what it is told."""

    enabled: bool = True
    uri: str | None = None
    """null: an sqlite database in the storage folder."""
    artifacts: str | None = None
    """null: for an sqlite database `mlartifacts` in the storage folder (with an object store: beside the
    database), the server's own place otherwise."""
    interval_s: float = Field(2.0, gt=0)
    finish_timeout_s: float = Field(60.0, gt=0)
    """How long the end of a run, or an audit that sends what MLflow lacks, waits for it to take the last."""


class Jobs(SitePart):
    """The Ray Jobs server that `vico submit` hands a run to."""

    address: str | None = None
    python: str = "python"
    """The interpreter on the cluster, in which this project's dependencies are installed."""


class Retries(SitePart):
    """How often a stage that failed is begun again by the same command, by the kind of failure and over the
    whole run. What only the user can mend (bad input, a full disk) never is. Workers are replaced within a
    stage before that: resources.max_retries, train.max_failures.
    """

    worker: int = Field(0, ge=0)
    """A process or node died for good, or a rank ended in an error."""
    io: int = Field(0, ge=0)
    """A file system or a connection failed."""
    memory: int = Field(0, ge=0)
    error: int = Field(0, ge=0)
    """Anything else that code raised."""
    pause_s: float = Field(30, ge=0)
    """Before the stage begins again."""


class Hook(SitePart):
    """What is told when a command on a run has ended, however it ended."""

    command: list[str] = []
    """Program and arguments; gets JSON on standard input."""
    url: str | None = Field(None, pattern=r"^https?://[^/]+")
    """Gets the same JSON as a POST."""
    timeout_s: float = Field(30, gt=0)


class Site(SitePart):
    name: str = "local"
    storage: Path = Path("runs")
    """A folder that every node sees, or `s3://bucket/prefix`: then this is the working copy of it on this
    machine."""
    work: Path | None = None
    """In which working copies of object stores lie; null: ~/.cache/vico."""
    ray: RaySettings = RaySettings()
    resources: Resources = Resources()
    train: TrainSettings = TrainSettings()
    inference: Inference = Inference()
    tracking: Tracking = Tracking()
    jobs: Jobs = Jobs()
    retries: Retries = Retries()
    hook: Hook = Hook()

    _remote: str | None = PrivateAttr(None)

    @model_validator(mode="wrap")
    @classmethod
    def storage_may_be_an_address(cls, given: Any, handler: ModelWrapValidatorHandler[Site]) -> Site:
        address = str(given.get("storage") or "").rstrip("/") if isinstance(given, dict) else ""
        if "://" not in address:
            site = handler(given)
            if isinstance(given, dict) and site.work is not None:
                raise ValueError(f"work={site.work} has no effect while storage is a folder; leave it out")
            return site
        if not re.match(r"s3://[^/]+", address):
            raise ValueError(f"storage={address} is no folder and no s3://bucket/prefix; name one of them")
        work = Path(given.get("work") or "~/.cache/vico")
        copy = work / hashlib.sha256(address.encode()).hexdigest()[:16]
        site = handler({**given, "storage": copy})
        if site.tracking.enabled and site.tracking.uri is None:
            raise ValueError(
                f"tracking.uri is not set, and a database cannot lie in storage={address}; set "
                "tracking.uri to a server or sqlite:///FILE, or tracking.enabled: false"
            )
        site._remote = address
        return site

    @property
    def remote(self) -> str | None:
        """The address of the object store; None where `storage` is a folder."""
        return self._remote

    @property
    def storage_address(self) -> str:
        """The storage as a user names it."""
        return self.remote or str(self.storage)

    def as_given(self) -> dict[str, Any]:
        """The settings as a site file may state them."""
        content = self.model_dump(mode="json")
        return {**content, "storage": self.remote} if self.remote else content

    @model_validator(mode="after")
    def local_ray_is_large_enough(self) -> Site:
        if self.ray.address is None and self.jobs.address is None:
            self.check_local_ray()
        return self

    def check_local_ray(self) -> None:
        """Raise ValueError for what a Ray on this machine cannot place and would wait for for ever."""
        for name in ("workers", "actors", "tasks"):
            count, threads = getattr(self.resources, name), self.resources.threads_per_worker
            if count * threads > self.ray.num_cpus:
                raise ValueError(
                    f"resources.{name}={count} with resources.threads_per_worker={threads} needs "
                    f"{count * threads} CPUs, more than ray.num_cpus={self.ray.num_cpus}; "
                    f"lower resources.{name} or raise ray.num_cpus"
                )

    @property
    def tracking_uri(self) -> str:
        return self.tracking.uri or f"sqlite:///{self.storage.resolve() / 'mlflow.db'}"

    @property
    def tracking_place(self) -> str:
        """The tracking URI without the password that it may hold, for files and messages."""
        return without_passwords(self.tracking_uri)
