"""What the commands of `vico` share: options, the site that they name, and output for people and programs."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from vico.errors import UserError

if TYPE_CHECKING:
    from cluster.site import Site

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="The pipeline file (YAML).")]


def run_ids(context: typer.Context, incomplete: str) -> list[str]:
    """Return the runs that a shell may complete to: those of the storage that was named, or of ./runs."""
    storage = Path(context.params.get("storage") or "runs")
    ids = sorted((path.parent.name for path in storage.glob("runs/*/run.json")), reverse=True)
    return [name for name in ["latest", *ids] if name.startswith(incomplete)]


RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="The run's id, a unique prefix of it, or `latest`.", autocompletion=run_ids
    ),
]
SiteOption = Annotated[
    str | None, typer.Option("--site", help="Site file, or the name of one in sites/; default: local.")
]
StorageOption = Annotated[
    str | None,
    typer.Option("--storage", help="Folder or s3://bucket/prefix instead of the site's."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, such as router.epochs=2; can be repeated.",
    ),
]
ForceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--force",
        metavar="STAGE",
        help="Run this stage and its dependents again; can be repeated.",
    ),
]
UntilOption = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")]
WaitOption = Annotated[
    float,
    typer.Option(
        "--wait", metavar="SECONDS", min=0, help="Wait this long if another command works on the run."
    ),
]
StrictOption = Annotated[
    bool,
    typer.Option(
        "--strict-code", help="Also run stages again whose source files or imported packages have changed."
    ),
]
AcceptOption = Annotated[
    bool,
    typer.Option("--accept", help="Make the model the candidate even if it does not pass quality_gate."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def site_of(site: str | None, storage: str | None) -> "Site":
    """Return the site of `--site` and `--storage`, with the working copy of an object store up to date.

    Raises UserError for a site file that is missing or wrong, and a storage that is not a folder.
    """
    from cluster.site_files import load_site

    loaded = load_site(site, storage=storage)
    if loaded.remote is not None:
        from pipeline.storage.lookup import storage_of
        from pipeline.storage.object_store import make_working_copy

        make_working_copy(loaded.storage, loaded.remote)
        storage_of(loaded.storage).refresh()
    nearest = next((path for path in (loaded.storage, *loaded.storage.parents) if path.exists()), None)
    if nearest is not None and not nearest.is_dir():
        what = "is a file" if nearest == loaded.storage else f"is below {nearest}, which is a file"
        raise UserError(f"storage={loaded.storage} {what}; name a folder with --storage")
    return loaded


def site_file(site: str | None) -> str | None:
    """Return the absolute path of the file that `--site` names; None if `local` has no file."""
    from cluster.site_files import site_path

    path = site_path(site)
    return None if path is None else str(path.absolute())


@contextmanager
def answer_stream(as_json: bool) -> Iterator[tuple[TextIO, TextIO]]:
    """Yield (stream for people, stream for the answer).

    For a program, standard output has nothing but the answer: whatever else writes to it, also libraries and
    child processes, is sent to standard error.
    """
    if not as_json:
        yield sys.stdout, sys.stdout
        return
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)
    yield sys.stderr, answer
