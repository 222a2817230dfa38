"""Where a server listens, who may use it, and what computes its answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.serving.http.access import OPEN, Access

if TYPE_CHECKING:
    from cluster.site import Site


@dataclass(frozen=True)
class VllmOptions:
    """The Python of vLLM's environment, further arguments of `vllm serve`, and the folder of the language
    model (None: beside the model, with the ending `.language`)."""

    python: str
    arguments: tuple[str, ...] = ()
    folder: Path | None = None


@dataclass(frozen=True)
class ReplicaOptions:
    """How many copies of the model answer, and the site that says on which Ray and with which resources."""

    number: int
    site: "Site"


@dataclass(frozen=True)
class ServerSettings:
    """The address of the server, and the device and dtype of the model. Port 0: a free port.

    `proxies` are addresses whose X-Forwarded-For names the client.
    """

    host: str
    port: int
    device: str
    dtype: str
    access: Access = OPEN
    proxies: tuple[str, ...] = ()
    vllm: VllmOptions | None = None
    """None: the built-in engine."""
    replicas: ReplicaOptions | None = None
    """None: the engine runs in this process."""
