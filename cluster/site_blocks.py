"""The smaller blocks of a site file; `cluster/site.py` puts them together, `train` is in a file of its
own."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SiteBlock(BaseModel):
    """What all blocks of a site file share: frozen, no unknown key, no nan or inf."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


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
    """Seconds that the processes of a local Ray may take to start; busy machines and slow disks need more."""
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
    """GPUs per worker, actor or task: 1 puts ranks and models on GPUs, 0 on CPUs whatever the nodes have.
    Stages that only run a model also accept a share of a GPU, such as 0.5."""
    max_retries: int = Field(2, ge=0)
    """Number of retries of an item after the process that worked on it died."""

    @property
    def per_process(self) -> dict[str, float]:
        """Return what Ray reserves for one worker, actor or task."""
        reserved: dict[str, float] = {"CPU": self.threads_per_worker}
        if self.gpus_per_worker:
            reserved["GPU"] = self.gpus_per_worker
        return reserved


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
    interval_s: float = Field(2.0, gt=0)
    """Seconds between two transfers of metrics to MLflow."""
    finish_timeout_s: float = Field(60.0, gt=0)
    """Seconds that the end of a run, or an audit that sends what MLflow lacks, waits for MLflow to take the
    rest."""


class Jobs(SiteBlock):
    """The Ray Jobs server to which `vico submit` sends a run."""

    address: str | None = None
    """Address of the Ray Jobs server, such as http://HOST:8265; null: no `vico submit`."""
    python: str = "python"
    """The interpreter on the cluster in which this project's dependencies are installed."""


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
