"""The JSON files of a storage: written as a whole or not at all; read with a check of schema and types.

Used for leases, runs, records and lists of parts; every such file has the key `schema`.
"""

import json
import os
import threading
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.durable_files import sync_folder
from vico.bounded_text import bounded_json
from vico.errors import UserError

SCHEMA = 1
_MAX_BYTES = 2**30
"""Of one file; lists of parts of a million files have some 100 MB."""


class OutputFile(BaseModel):
    """Size and sha256 of a file of a stage's output, as records and lists of parts keep them."""

    model_config = ConfigDict(strict=True, frozen=True)

    bytes: int
    sha256: str


class StoredModel(BaseModel):
    """A JSON file of the storage. Types are checked strictly; unknown keys of the same schema are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)

    schema_version: int = Field(SCHEMA, alias="schema")

    @classmethod
    def read(cls, path: Path, remedy: str) -> Self | None:
        """Return the content of the file, or None if it does not exist.

        Raises UserError if the file is damaged: path, fault and `remedy`.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); fix the file or its permissions"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is damaged (not UTF-8 text); {remedy}") from error
        try:
            content = bounded_json(text, _MAX_BYTES)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged (not valid JSON at line {error.lineno}); {remedy}") from error
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); {remedy}") from error
        if not isinstance(content, dict):
            raise UserError(f"{path} is damaged (a {type(content).__name__} instead of an object); {remedy}")
        if content.get("schema") != SCHEMA:
            raise UserError(
                f"{path} has schema {content.get('schema')!r}, this vico reads {SCHEMA}; "
                "use the vico version that wrote it or another --storage"
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{path} is damaged ({field}: {first['msg'].lower()}); {remedy}") from error

    def write(self, path: Path) -> None:
        """Write the file; only for files that no other process reads or writes (others: the storage's
        `write`)."""
        write_json(path, self.content())

    def content(self) -> dict[str, Any]:
        """Return the content as JSON types."""
        return self.model_dump(mode="json", by_alias=True)


def write_json(path: Path, content: Any) -> None:
    """Replace the file in one step: after a crash it has the old content or the new one."""
    write_bytes(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file in one step, as `write_json` does."""
    os.replace(_whole_file_beside(path, data), path)
    sync_folder(path.parent)


def write_bytes_once(path: Path, data: bytes) -> None:
    """Create the file in one step, unless there is one: of several writers, the first one wins.

    The file system must have hard links. Raises OSError.
    """
    temporary = _whole_file_beside(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    sync_folder(path.parent)


def _whole_file_beside(path: Path, data: bytes) -> Path:
    """Write the bytes to a temporary file in the folder of `path`, and return it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    temporary.unlink(missing_ok=True)  # left by a process that is gone, or a link
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is None:  # a full disk, for example; the message needs the path
            error.filename = str(path)
        raise
    return temporary
