"""The archive of the project's sources that a job brings along."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from cluster.project import PROJECT_FOLDER, STARTER_FOLDER
from cluster.sources.in_worker import PACKAGES


def package_files(files: Mapping[str, str], *, with_sources: bool) -> dict[str, bytes]:
    """Return the content of a job's package by path: `files`, after the project's sources if wanted."""
    sources = {
        source.relative_to(PROJECT_FOLDER).as_posix(): source.read_bytes()
        for package in (PACKAGES if with_sources else ())
        for source in sorted((PROJECT_FOLDER / package).rglob("*"))
        if source.is_file() and "__pycache__" not in source.parts and not _is_unused_in_jobs(source)
    }
    return sources | {name: text.encode() for name, text in files.items()}


def _is_unused_in_jobs(path: Path) -> bool:
    """Return whether a file is of those that `vico init` copies; jobs read only the locked versions."""
    return STARTER_FOLDER in path.parents and path.name != "constraints.txt"


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
