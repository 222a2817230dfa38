"""What one `vico run` carries from its start to its end, and how it ends. Made by the runner."""

from dataclasses import dataclass

from cluster.site import Site
from pipeline.planning.request import OpenPipeline, RunRequest
from pipeline.results.runs import State
from pipeline.running.signals import StopSignals
from pipeline.terminal.progress import Display


@dataclass(frozen=True)
class RunCommand:
    """One command: what it asks for, the pipeline as planned, its signals, and the display it reports to."""

    request: RunRequest
    opened: OpenPipeline
    signals: StopSignals
    display: Display

    @property
    def site(self) -> Site:
        return self.request.site


@dataclass(frozen=True)
class RunResult:
    """How a command ended: the run, its state, the exit code, and unless all is well a line for the user."""

    run: str
    state: State
    storage: str
    """Address of the storage, as the user knows it."""
    exit_code: int = 0
    message: str = ""
