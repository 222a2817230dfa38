"""record.json and attempt.json: what a stage's result and each attempt at it were made from, when and
where."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from pipeline.identity.fingerprints import digest
from pipeline.json_files import OutputFile, StoredModel

RECORD_FILE = "record.json"
ATTEMPT_FILE = "attempt.json"
CODE = "code"
"""Key in `facts` of a record: digest of all code of the project in the driver, and digest -> number of
processes for the workers of the attempt."""
PICTURE_ROOTS = "picture_roots"
"""Key in `facts` of a record: the folders whose pictures the stage read, sorted."""
CODES_OF_ATTEMPTS = "sources_of_attempts"
"""Key in `facts` of a record: attempt -> digest of its source files, if the attempts had different ones."""
PACKAGES_OF_ATTEMPTS = "packages_of_attempts"
"""Key in `facts` of a record: attempt -> versions (null: not installed) of the packages that were others than
in the record, if there were any."""


class Record(StoredModel):
    """record.json of a finished stage."""

    stage: str
    fingerprint: str
    identity: dict[str, Any]
    """`stage_identity`: what the fingerprint was computed from."""
    attempt: int
    run: str
    git: dict[str, Any]
    source_digest: str
    sources: dict[str, str]
    """Source file -> sha256."""
    packages: dict[str, str]
    outputs: dict[str, OutputFile]
    output_digest: str
    inputs: dict[str, str]
    """Input name -> `output_digest` of the stage that made it, or digest of the source."""
    counts: dict[str, Any]
    seconds: float
    started: str
    ended: str
    site: str
    facts: dict[str, Any]
    """Where it ran, and the digests of all sources if attempts of different code made it."""
    mlflow_run_id: str | None = None
    record_digest: str | None = None
    """Digest of the rest of the file; the audit sees by it that somebody edited the record."""

    @field_validator("git")
    @classmethod
    def _texts_of_git(cls, git: dict[str, Any]) -> dict[str, Any]:
        for name in ("commit", "patch", "error"):
            if not isinstance(git.get(name), str | None):
                raise ValueError(f"{name} is not text")
        return git

    @field_validator("facts")
    @classmethod
    def _blocks_of_facts(cls, facts: dict[str, Any]) -> dict[str, Any]:
        versions = facts.get(PACKAGES_OF_ATTEMPTS) or {}
        for name in (CODE, CODES_OF_ATTEMPTS, PACKAGES_OF_ATTEMPTS, "resources"):
            if not isinstance(facts.get(name), dict | None):
                raise ValueError(f"{name} is not an object")
        if not all(isinstance(of_attempt, dict) for of_attempt in versions.values()):
            raise ValueError(f"{PACKAGES_OF_ATTEMPTS} does not have an object for each attempt")
        return facts


class AttemptFile(StoredModel):
    """attempts/<n>/attempt.json, written before the attempt's first part."""

    attempt: int
    run: str
    started: str
    inputs: dict[str, str]
    """Digests of the inputs; another attempt continues with the parts only if its inputs have the same."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Source file -> sha256 when the attempt began; empty if that was not recorded."""
    packages: dict[str, str] = Field(default_factory=dict)
    """Installed package -> version when the attempt began; empty if that was not recorded."""
    expected: list[str] = Field(default_factory=list)
    """Outputs that an earlier record names and that were missing or damaged: the stage must make them
    again."""


def outputs_digest(outputs: Mapping[str, OutputFile]) -> str:
    """Return one digest over names, sizes and contents of a stage's output."""
    return digest({name: file.model_dump() for name, file in outputs.items()})


def record_digest(content: Mapping[str, Any]) -> str:
    """Return the digest of the content of a record.json without its `record_digest`."""
    rest = {name: value for name, value in content.items() if name != "record_digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
