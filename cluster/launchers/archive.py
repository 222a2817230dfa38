"""The archive of the project's sources that a job brings along."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from cluster.project import PROJECT_FOLDER, STARTER_FOLDER
from cluster.sources.in_worker import PACKAGES
from vico.errors import UserError
from vico.own_files import is_inside


def package_files(files: Mapping[str, str], *, with_sources: bool) -> dict[str, bytes]:
    """Return the content of a job's package by path: `files`, after the project's sources if wanted.

    Sources are modules and `constraints.txt`: what else is beside them, such as `.env` or a key, stays here.
    Raises UserError for a module that is a link out of the checkout.
    """
    sources = {
        source.relative_to(PROJECT_FOLDER).as_posix(): source.read_bytes()
        for package in (PACKAGES if with_sources else ())
        for source in sorted((PROJECT_FOLDER / package).rglob("*.py"))
        if _is_module(source)
    }
    if with_sources:  # the locked versions, with which the job compares the packages that it finds
        locked = STARTER_FOLDER / "constraints.txt"
        sources[locked.relative_to(PROJECT_FOLDER).as_posix()] = locked.read_bytes()
    return sources | {name: text.encode() for name, text in files.items()}


def _is_module(path: Path) -> bool:
    names = path.relative_to(PROJECT_FOLDER).with_suffix("").parts
    if not (path.is_file() and all(map(str.isidentifier, names))):
        return False
    if not is_inside(path, PROJECT_FOLDER):
        raise UserError(
            f"{path} is a link to {path.resolve()}, which no job takes along; copy the file there"
        )
    return True


def write_package(path: Path, files: Mapping[str, str], *, with_sources: bool = True) -> None:
    """Write the project's sources and `files` (name -> text) as a zip; equal content gives equal bytes."""
    with path.open("wb") as stream:
        write_package_to(stream, files, with_sources=with_sources)


def write_package_to(stream: IO[bytes], files: Mapping[str, str], *, with_sources: bool) -> None:
    """Write the zip of `write_package` to a stream."""
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in package_files(files, with_sources=with_sources).items():
            member = zipfile.ZipInfo(name)  # with a fixed date
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(member, content)
