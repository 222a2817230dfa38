"""Results on disk: which are reused, which are refused, which move to superseded/. tests/integration checks
the same with whole commands."""

import json
import shutil

import pytest

from pipeline.identity.fingerprints import stage_fingerprint
from pipeline.planning.stage_status import stage_status
from pipeline.results.records import Record, outputs_digest
from pipeline.results.stage_folder import StageFolder, records_of
from pipeline.storage.leases import Leases
from stages.stops import LeaseLost
from vico.errors import UserError

IDENTITY = {"code_version": 1, "config": {"size": 2}, "inputs": {"shard": "f" * 64}}
FINGERPRINT = stage_fingerprint("ratio", IDENTITY)
INPUTS = {"shard": "digest of the shards' bytes"}


@pytest.fixture
def folder(tmp_path):
    return StageFolder(tmp_path, "ratio", FINGERPRINT)


def attempt(folder, names=("a.parquet", "deep/b.parquet"), *, record=True, expected=()):
    """Make one attempt at the stage, recorded or left unfinished."""
    with Leases(folder.storage).acquire(folder.path, "run-1", min_attempt=folder.last_attempt() + 1) as lease:
        parts = folder.begin(lease, INPUTS, expected, "2026-01-01T00:00:00+00:00")
        for name in names:
            if not parts.done(name):
                parts.partial(name).write_text(f"content of {name}")
                parts.publish(name)
        if record:
            folder.finish(lease, new_record(folder, lease.attempt))
    return parts


def new_record(folder, number):
    outputs = folder.outputs()
    return Record(
        stage="ratio",
        fingerprint=FINGERPRINT,
        identity=IDENTITY,
        attempt=number,
        run="run-1",
        git={},
        source_digest="",
        sources={},
        packages={},
        outputs=outputs,
        output_digest=outputs_digest(outputs),
        inputs=INPUTS,
        counts={},
        seconds=1.0,
        started="2026-01-01T00:00:00+00:00",
        ended="2026-01-01T00:01:00+00:00",
        site="local",
        facts={},
    )


def edit_record(folder, **fields):
    content = {**json.loads(folder.record_path.read_text()), **fields}
    folder.record_path.write_text(json.dumps(content))


def test_a_recorded_result_is_reused(folder, tmp_path):
    assert stage_status(folder, INPUTS).kind == "new"
    attempt(folder)
    status = stage_status(folder, INPUTS)
    assert (status.kind, status.reason) == ("reuse", "done in run run-1")
    assert sorted(status.record.outputs) == ["a.parquet", "deep/b.parquet"]
    assert [record.fingerprint for record in records_of(tmp_path, "ratio")] == [FINGERPRINT]


def test_output_without_a_record_is_resumed_and_never_taken_for_done(folder):
    attempt(folder, record=False)
    status = stage_status(folder, INPUTS)
    assert (status.kind, status.reason) == ("resume", "unfinished: resumes from attempt 1")
    attempt(folder, record=False)
    assert stage_status(folder, INPUTS).reason == "unfinished: resumes from attempt 2"


def test_a_copy_of_an_attempt_is_no_attempt(folder):
    attempt(folder, record=False)
    shutil.copytree(folder.path / "attempts" / "1", folder.path / "attempts" / "1.bak")
    assert [file.attempt for file in folder.attempt_files()] == [1]
    assert folder.last_attempt() == 1


def test_output_without_an_attempt_is_not_built_on(folder):
    folder.output.mkdir(parents=True)
    (folder.output / "a.parquet").write_text("?")
    assert stage_status(folder, INPUTS).kind == "restart"


def test_a_result_of_other_input_bytes_is_neither_reused_nor_resumed(folder):
    attempt(folder, record=False)
    other = {"shard": "other bytes under the same fingerprint"}
    assert stage_status(folder, other).kind == "restart"
    attempt(folder)
    status = stage_status(folder, other)
    assert status.kind == "restart"
    assert status.reason == "input bytes changed: shard digest of th -> other bytes "
    assert stage_status(folder, {"shard": None}).kind == "unknown"


def test_missing_and_resized_outputs_are_found(folder):
    attempt(folder)
    (folder.output / "deep/b.parquet").unlink()
    status = stage_status(folder, INPUTS)
    assert (status.kind, status.reason) == ("rebuild", "output/deep/b.parquet is missing; to be rebuilt")
    with (folder.output / "a.parquet").open("a") as file:
        file.write("!")
    assert stage_status(folder, INPUTS).reason == "output/deep/b.parquet is missing and 1 more; to be rebuilt"
    assert stage_status(folder, INPUTS).expected == ("deep/b.parquet", "a.parquet")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is damaged (not valid JSON at line 1)"),
        ('{"schema": 1, "stage": "ratio",', "is damaged (not valid JSON"),
        ("[1]", "is damaged (a list instead of an object)"),
        ('{"schema": 1}', "is damaged (stage: field required)"),
        ('{"schema": 99, "stage": "ratio"}', "has schema 99, this vico reads 1"),
        (b"\xff\xfe", "is damaged (not UTF-8 text)"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused_with_path_and_remedy(folder, content, message):
    attempt(folder)
    folder.record_path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        stage_status(folder, INPUTS)
    text = str(error.value)
    assert str(folder.record_path) in text and message in text and "\n" not in text
    assert "--force ratio" in text or "use the vico version that wrote it" in text


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"seconds": "long"}, "is damaged (seconds: "),
        ({"attempt": 1.5}, "is damaged (attempt: "),
        ({"outputs": {"a.parquet": {"bytes": "3", "sha256": "x"}}}, "is damaged (outputs.a.parquet.bytes: "),
        ({"git": {"commit": 5}}, "is damaged (git: value error, commit is not text)"),
        ({"facts": {"packages_of_attempts": 5}}, "value error, packages_of_attempts is not an object)"),
        ({"facts": {"packages_of_attempts": {"1": []}}}, "does not have an object for each attempt)"),
        ({"facts": {"code": [1]}}, "is damaged (facts: value error, code is not an object)"),
        ({"outputs": {}}, "was changed (output_digest does not fit its outputs)"),
        ({"identity": {**IDENTITY, "config": {"size": 3}}}, "does not belong here"),
        ({"fingerprint": "0" * 64}, "does not belong here"),
        ({"stage": "label"}, "does not belong here"),
    ],
)
def test_a_record_changed_by_hand_is_refused(folder, fields, message):
    attempt(folder)
    edit_record(folder, **fields)
    with pytest.raises(UserError) as error:
        stage_status(folder, INPUTS)
    assert message in str(error.value) and "--force ratio" in str(error.value)


def test_superseded_results_are_kept_and_attempt_numbers_continue(folder):
    attempt(folder)
    with Leases(folder.storage).acquire(folder.path, "run-2", min_attempt=folder.last_attempt() + 1) as lease:
        superseded = folder.supersede(lease)
    assert (superseded / "output/deep/b.parquet").read_text() == "content of deep/b.parquet"
    assert (superseded / "record.json").exists() and (superseded / "attempts/1/attempt.json").exists()
    assert stage_status(folder, INPUTS).kind == "new"
    (folder.path / "lease.json").unlink()
    assert folder.last_attempt() == 1
    assert attempt(folder).attempt == 2
    with Leases(folder.storage).acquire(folder.path, "run-3") as lease:
        assert folder.supersede(lease).name == "2"
    with Leases(folder.storage).acquire(folder.path, "run-3") as lease:
        assert folder.supersede(lease) is None


def test_only_the_damaged_parts_are_superseded_for_a_rebuild(folder):
    attempt(folder)
    (folder.output / "a.parquet").write_text("cut")
    status = stage_status(folder, INPUTS)
    with Leases(folder.storage).acquire(folder.path, "run-2", min_attempt=2) as lease:
        superseded = folder.supersede_record(lease, status.damage)
        parts = folder.begin(lease, INPUTS, status.expected, "now")
    assert (superseded / "output/a.parquet").read_text() == "cut"
    assert parts.done("deep/b.parquet") and not parts.done("a.parquet")
    assert stage_status(folder, INPUTS).expected == ("a.parquet",)


def test_half_written_parts_are_cleared_and_never_recorded(folder):
    parts = attempt(folder, record=False)
    parts.partial("c.parquet").write_text("half")
    (parts.partial("deep/checkpoint") / "inner").mkdir(parents=True)
    assert sorted(folder.outputs()) == ["a.parquet", "deep/b.parquet"]
    attempt(folder)
    assert not list(folder.output.rglob("*.partial-*"))


def test_a_record_is_not_written_under_a_lost_lease(folder):
    with Leases(folder.storage).acquire(folder.path, "run-1") as lease:
        folder.begin(lease, INPUTS, (), "now")
        path = folder.path / "lease.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "token": "another"}))
        with pytest.raises(LeaseLost):
            folder.finish(lease, new_record(folder, 1))
    assert not folder.record_path.exists()
