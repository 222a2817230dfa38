"""Pipeline files, site files, overrides, and the JSON files of a storage."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from cluster.metric_lines import last_metric_line, metric_lines
from cluster.site_files import load_site
from pipeline.config.graph import pipeline_graph
from pipeline.config.pipeline_file import load_config
from pipeline.identity.file_digests import DigestCache
from pipeline.identity.fingerprints import stage_fingerprint
from pipeline.json_files import OutputFile
from pipeline.results.records import ATTEMPT_FILE, AttemptFile, outputs_digest
from pipeline.results.runs import Runs
from pipeline.results.stage_folder import StageFolder, records_of
from pipeline.storage.lease_file import read_lease
from pipeline.storage.parts_file import read_parts
from pipeline.tracking.sent import SentState
from tests.fuzz.hostile import bytes_of, json_of
from tests.fuzz.targets import Target

_CONFIGS = Path(__file__).parents[2]
_IDENTITY = {"stage": "shard", "config": {}, "inputs": {}}
_FINGERPRINT = stage_fingerprint("shard", _IDENTITY)
_OUTPUTS = {"a.tar": OutputFile(bytes=1, sha256="0")}
_RECORD = {
    "schema": 1,
    "stage": "shard",
    "fingerprint": _FINGERPRINT,
    "identity": _IDENTITY,
    "attempt": 1,
    "run": "r",
    "git": {},
    "source_digest": "",
    "sources": {"a": "b"},
    "packages": {},
    "inputs": {},
    "outputs": {"a.tar": {"bytes": 1, "sha256": "0"}},
    "output_digest": outputs_digest(_OUTPUTS),
    "counts": {},
    "seconds": 1.0,
    "started": "",
    "ended": "",
    "site": "",
    "facts": {},
}
_RUN = {
    "schema": 1,
    "run": "r",
    "created": "2026-01-01",
    "pipeline": "",
    "experiment": "vico",
    "config": {},
    "site": "",
    "state": "running",
    "stages": {"shard": {"fingerprint": _FINGERPRINT, "state": "running"}},
    "attempts": [{"started": "", "host": "h", "pid": 1}],
}
_LEASE = {
    "schema": 1,
    "run": "r",
    "attempt": 1,
    "token": "t",
    "host": "h",
    "boot_id": "b",
    "pid_namespace": "n",
    "pid": 1,
    "pid_started": "1",
    "since": "",
    "counter": 1,
}
_FILES = {
    "record.json": _RECORD,
    "run.json": _RUN,
    "lease.json": _LEASE,
    ATTEMPT_FILE: {"schema": 1, "attempt": 1, "run": "r", "started": "", "inputs": {}},
    "parts.json": {"schema": 1, "attempt": 1, "parts": {"a": {"a/b": {"bytes": 1, "sha256": "0"}}}},
    "mlflow.json": {"schema": 1, "runs": {"shard": {"id": "1", "began": ""}}, "uri": "u"},
    "digests.json": {"schema": 1, "files": {"/a": [1, 2, 3, 4, "x"]}},
    "metrics.jsonl": {"step": 1, "time": 1.5, "metrics": {"loss": 0.5}},
}


def targets(folder: Path) -> list[Target]:
    """Return the targets of configs and of the store's files."""
    pipelines = [path.read_bytes() for path in sorted((_CONFIGS / "configs").glob("*.yaml"))]
    pipelines.append(b"a: &a [1, 2]\nb: &b [*a, *a]\ninputs: {<<: {records: {format: demo}}, model: *b}\n")
    sites = [path.read_bytes() for path in sorted((_CONFIGS / "sites").glob("*.yaml"))]
    stored = st.one_of([st.tuples(st.just(name), json_of([content])) for name, content in _FILES.items()])
    return [
        Target("pipeline", st.one_of(bytes_of(pipelines), json_of(_values(pipelines[:-1]))), _pipeline),
        Target("site", st.one_of(bytes_of(sites), json_of(_values(sites))), _site),
        Target("store", stored, partial(_stored)),
    ]


def _values(texts: list[bytes]) -> list[Any]:
    return [yaml.safe_load(text) for text in texts]


def _pipeline(folder: Path, data: bytes) -> None:
    (folder / "pipeline.yaml").write_bytes(data)
    load_config(folder / "pipeline.yaml", pipeline_graph())


def _site(folder: Path, data: bytes) -> None:
    (folder / "site.yaml").write_bytes(data)
    load_site(folder / "site.yaml", storage=folder / "store")


def _stored(folder: Path, case: tuple[str, bytes]) -> None:
    name, data = case
    store = folder / "store"
    stage, run = store / "shard" / _FINGERPRINT, store / "runs" / "r"
    shutil.rmtree(store, ignore_errors=True)
    attempt = stage / "attempts" / "1"
    for parent in (attempt, run, stage / "output"):
        parent.mkdir(parents=True)
    if name == "digests.json":
        (store / name).write_bytes(data)
        DigestCache(store)
    elif name == "metrics.jsonl":
        path = attempt / name
        path.write_bytes(data + b"\n" + data)
        list(metric_lines(path))
        last_metric_line(path)
    elif name == ATTEMPT_FILE:
        (attempt / name).write_bytes(data)
        StageFolder(store, "shard", _FINGERPRINT).attempt_files()
        AttemptFile.read(attempt / name, "remedy")
    elif name in ("run.json", "mlflow.json"):
        (run / name).write_bytes(data)
        if name == "run.json":
            Runs(store).all()
        else:
            SentState.of(run, load_site(storage=store))
    elif name == "lease.json":
        (stage / name).write_bytes(data)
        holder = read_lease(stage)
        if holder is not None:
            holder.is_dead()
    elif name == "parts.json":
        (stage / name).write_bytes(data)
        assert read_parts(stage).files is not None
    else:
        (stage / name).write_bytes(data)
        records_of(store, "shard")
        record = StageFolder(store, "shard", _FINGERPRINT).record()
        assert record is not None
        StageFolder(store, "shard", _FINGERPRINT).refuse_edited(record)
        StageFolder(store, "shard", _FINGERPRINT).damage(record)
