"""Runs whose stages are finished, written into a storage as the driver writes them."""

import json

from pipeline.identity.fingerprints import stage_fingerprint
from pipeline.results.records import Record, outputs_digest
from pipeline.results.runs import Runs
from pipeline.results.stage_folder import StageFolder
from pipeline.storage.leases import Leases


def finished_stage(storage, run, name, files, counts, made_from=None, **fields):
    """Write the finished result of a stage as a run would; return its fingerprint.

    `files` are texts or bytes by name, those of `attempt/NAME` go into the folder of the attempt. `fields`
    replace those of the record. `made_from`: input -> fingerprint.
    """
    identity = {"code_version": 1, "config": {"of": run}, "inputs": made_from or {}}
    folder = StageFolder(storage, name, stage_fingerprint(name, identity))
    with Leases(folder.storage).acquire(folder.path, run) as lease:
        parts = folder.begin(lease, {"records": "d" * 64, "model": "e" * 64}, (), "2026-01-01T00:00:00+00:00")
        with folder.storage.sharing(folder.path, parts.attempt_folder):
            _write(parts, files)
        folder.storage.flush(folder.path)
        outputs = folder.outputs()
        record = {
            "stage": name,
            "fingerprint": folder.fingerprint,
            "identity": identity,
            "attempt": 1,
            "run": run,
            "git": {},
            "source_digest": "",
            "sources": {},
            "packages": {},
            "outputs": outputs,
            "output_digest": outputs_digest(outputs),
            "inputs": {},
            "counts": counts,
            "seconds": 1.0,
            "started": "2026-01-01T00:00:00+00:00",
            "ended": "2026-01-01T00:01:00+00:00",
            "site": "local",
            "facts": {"host": "machine"},
        }
        folder.finish(lease, Record(**{**record, **fields}))
    return folder.fingerprint


def _write(parts, files):
    for file, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        if file.startswith("attempt/"):
            (parts.attempt_folder / file.removeprefix("attempt/")).write_bytes(data)
            continue
        parts.partial(file).write_bytes(data)
        parts.publish(file)


def finished_run(storage, metrics, counts=None, **config):
    """Return a run with the stages evaluate and export; `counts` are those of their records, by stage."""
    runs = Runs(storage)
    run = runs.create(
        pipeline="p",
        fingerprints={"evaluate": "a" * 64, "export": "b" * 64},
        experiment="e",
        config=config,
        site="s",
    )
    files = {
        "evaluate": {"metrics.json": json.dumps(metrics)},
        "export": {"model/config.json": json.dumps({"of": run.run})},
    }
    for name, contents in files.items():
        entry = run.stages[name]
        entry.fingerprint = finished_stage(storage, run.run, name, contents, (counts or {}).get(name, {}))
        entry.state, entry.attempt = "done", 1
    run.state = "done"
    runs.save(run)
    return run
