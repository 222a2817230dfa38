"""`vico report RUN`: write the page about a run into a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.site import Site
from pipeline.json_files import write_bytes
from pipeline.report.contents import report_of
from pipeline.report.page import GENERATOR, rendered
from pipeline.results.runs import Runs
from pipeline.running.jobs import with_job_state
from vico.errors import UserError

_HEAD_BYTES = 2000
"""A report names its generator within so many bytes."""


@dataclass(frozen=True)
class WrittenReport:
    """A report that was written; `missing` has one sentence per part that could not be shown."""

    run: str
    path: Path
    num_bytes: int
    missing: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "report": str(self.path),
            "bytes": self.num_bytes,
            "missing": list(self.missing),
        }


def write_report(site: Site, name: str, out: Path | None) -> WrittenReport:
    """Write the report of a run to `out`, by default `<run>.html`; an earlier report there is replaced.

    Raises UserError if `out` is something else, or cannot be written.
    """
    run = with_job_state(Runs(site.storage).named(name))
    path = (out or Path(f"{run.run}.html")).absolute()
    _refuse_other_file(path)
    report = report_of(run, site)
    data = rendered(report).encode()
    try:
        write_bytes(path, data)
    except OSError as error:
        raise UserError(f"--out={path} cannot be written ({error.strerror}); name another file") from error
    return WrittenReport(run.run, path, len(data), tuple(report.missing()))


def _refuse_other_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"--out={path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"--out={path}: {path.parent} is not a folder; create it or name another file")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--out={path} cannot be read ({error.strerror}); name another file") from error
    if f'content="{GENERATOR}"'.encode() not in head:
        raise UserError(f"--out={path} exists and is not a report of vico; name another file")
