"""Which policy losses of tiles belong to: a mark in the tables of ratios and labels, and its check.

A table that is adopted (`inputs.adopt`) may come from another policy. The mark is the digest of the policy's
weights in the metadata of the parquet file.
"""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vico.errors import UserError

_KEY = b"vico.policy"


def policy_digest(policy_folder: Path) -> str:
    """Return one sha256 over the policy's files of weights, which may be sharded."""
    whole = hashlib.sha256()
    for path in sorted(policy_folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def with_policy(table: pa.Table, policy_folder: Path) -> pa.Table:
    """Return the table of losses with the mark of this policy."""
    mark = {_KEY: policy_digest(policy_folder).encode()}
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **mark})


def with_policy_of(table: pa.Table, losses: pa.Table) -> pa.Table:
    """Return the table with the mark of the losses that it was made from."""
    mark = (losses.schema.metadata or {}).get(_KEY)
    return table if mark is None else table.replace_schema_metadata({_KEY: mark})


def check_policy(path: Path, policy_folder: Path, stage: str) -> None:
    """Raise UserError if the table at `path`, of a `stage`, was made from losses of another policy.

    A table without a mark, from an earlier version, is not compared.
    """
    mark = (pq.read_schema(path).metadata or {}).get(_KEY)
    if mark is None or mark.decode() == policy_digest(policy_folder):
        return
    raise UserError(
        f"{path}: its losses are of another policy than {policy_folder}; adopt a {stage} result that was "
        f"made with this policy, or leave out inputs.adopt.{stage}"
    )
