"""The store's JSON files: written whole or not at all, read with their schema and form checked.

Used by store, lease and runs; every such file carries `schema`.
"""

import json
import os
import threading
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.durable_files import sync_folder
from vico.errors import UserError

SCHEMA = 1


class OutputFile(BaseModel):
    """What records and lists of parts say of a file: its size and sha256."""

    model_config = ConfigDict(strict=True, frozen=True)

    bytes: int
    sha256: str


class StoredModel(BaseModel):
    """A file of the store. Types are checked strictly; unknown keys of the same schema are kept out of the
    way."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)

    schema_version: int = Field(SCHEMA, alias="schema")

    @classmethod
    def read(cls, path: Path, remedy: str) -> Self | None:
        """The file's content, None if there is no file; UserError names path, fault and `remedy` if it is
        damaged."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); mend the file or its rights"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is damaged (not UTF-8 text); {remedy}") from error
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged (no valid JSON at line {error.lineno}); {remedy}") from error
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
        """For files that one process alone writes and reads; others go through the storage."""
        write_json(path, self.content())

    def content(self) -> dict[str, Any]:
        """As JSON types."""
        return self.model_dump(mode="json", by_alias=True)


def write_json(path: Path, content: Any) -> None:
    """Replace the file in one step; after a crash there is the old content or the new one."""
    write_bytes(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file in one step, as `write_json` does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)
