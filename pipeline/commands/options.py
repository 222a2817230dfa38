"""What the commands of `vico` share: options, what they name, the answer for programs."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from vico.errors import UserError

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="Pipeline file (YAML).")]
SiteOption = Annotated[str | None, typer.Option("--site", help="Site file, or the name of one in sites/.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Id, beginning of an id, or `latest`.")]
StorageOption = Annotated[
    str | None, typer.Option("--storage", help="Folder or s3://bucket/prefix; default: the site's.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, such as consistency.packs_per_step=4."),
]
ForceOption = Annotated[
    list[str] | None,
    typer.Option("--force", metavar="STAGE", help="Run this stage again, and what depends on it."),
]
UntilOption = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")]
WaitOption = Annotated[
    float, typer.Option("--wait", metavar="SECONDS", min=0, help="How long to wait for another driver.")
]
StrictOption = Annotated[
    bool, typer.Option("--strict-code", help="Run stages again whose source files have changed.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def site_of(site: str | None, storage: str | None) -> Any:
    from cluster.site_files import load_site

    found = load_site(site, storage=storage)
    if found.remote is not None:
        from pipeline.storage.lookup import storage_of
        from pipeline.storage.object_store import make_working_copy

        make_working_copy(found.storage, found.remote)
        storage_of(found.storage).refresh()
    if found.storage.exists() and not found.storage.is_dir():
        raise UserError(f"storage={found.storage} is a file; name a folder with --storage")
    return found


def run_request(
    config: Path,
    site: str | None,
    storage: str | None,
    overrides: list[str] | None,
    force: list[str] | None,
    until: str | None,
    wait_s: float = 0.0,
    strict_code: bool = False,
) -> Any:
    from pipeline.planning.request import RunRequest

    where = site_of(site, storage)
    asked = tuple(overrides or ()), tuple(force or ()), until
    return RunRequest(config, where, *asked, wait_s, strict_code)


@contextmanager
def answer_stream(as_json: bool) -> Iterator[tuple[TextIO, TextIO]]:
    """(stream for people, stream for the answer). For a program standard output is the answer's alone:
    whatever else writes to it, libraries and child processes included, is sent to standard error."""
    if not as_json:
        yield sys.stdout, sys.stdout
        return
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)
    yield sys.stderr, answer


def print_json(stream: TextIO, value: Any) -> None:
    stream.write(json.dumps(value, ensure_ascii=False) + "\n")
    stream.flush()


def print_errors(message: str) -> None:
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)
