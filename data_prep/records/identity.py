"""What identifies records: a fingerprint of their content that does not depend on where they are."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from data_prep.records.config import RecordsConfig
from data_prep.records.internvl import MetaSet
from data_prep.records.sets import meta_sets
from data_prep.remote_files import Location, open_file

READER_VERSION = 2
"""Raised when the code of this folder reads some rows differently. The demo's rows do not pass through it."""


def file_sha256(location: Location) -> str:
    """Return the sha256 of a local or remote file as hexadecimal digits."""
    with open_file(location) as file:
        # typeshed's BinaryIO has no readinto; what open_file returns has it
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def records_fingerprint(
    config: RecordsConfig, annotation_sha256: Callable[[Location], str] = file_sha256
) -> str:
    """Return a sha256 over annotation bytes, set names and the fields that change what is learned.

    Roots and paths never enter. Pictures beside an annotation are not read: the index has their digests after
    sharding. Parquet files and tars are read in full. `annotation_sha256` may cache digests.
    """
    if config.format == "sources":
        identity = {"sources": [_source_identity(source, annotation_sha256) for source in config.sources]}
    else:
        identity = _source_identity(config, annotation_sha256)
    text = json.dumps({**identity, "format": config.format}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _source_identity(config: RecordsConfig, annotation_sha256: Callable[[Location], str]) -> dict[str, Any]:
    identity: dict[str, Any]
    if config.format == "demo":
        from data_prep.demo.records import DEMO_VERSION

        identity = {"demo": DEMO_VERSION, "num_samples": config.num_samples, "seed": config.seed}
    else:
        sets = [_set_identity(meta_set, annotation_sha256) for meta_set in meta_sets(config)]
        identity = {"sets": sets, "reader": READER_VERSION}
    changed = {name: getattr(config, name) for name in ("name", "weight", "follow_links", "mark_first")}
    defaults = type(config).model_fields
    identity |= {name: value for name, value in changed.items() if value != defaults[name].default}
    return {"format": config.format, **identity}


def _set_identity(meta_set: MetaSet, annotation_sha256: Callable[[Location], str]) -> dict[str, Any]:
    stated = {"license": meta_set.license, "source": meta_set.source}
    return {
        "name": meta_set.name,
        "annotation": annotation_sha256(meta_set.annotation),
        "repeat_time": meta_set.repeat_time,
        "max_dynamic_patch": meta_set.max_dynamic_patch,
        **{name: value for name, value in stated.items() if value},
    }
