"""The working copies that two machines have of one stage: attempts, uploads, downloads, conflicts."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from pipeline.identity.file_digests import file_sha256s
from pipeline.results.attempt_metrics import GrowingMetrics
from pipeline.results.garbage import collect_garbage
from pipeline.storage import bucket, object_store
from pipeline.storage.folder import Conflict
from pipeline.storage.lease_file import Holder
from pipeline.storage.leases import LeaseHeld, Leases
from pipeline.storage.parts_file import file_keys, read_parts
from stages.parts import LEASE_FILE, Parts
from stages.stops import LeaseLost
from tests.waiting import PATIENCE_S, wait_until
from vico.errors import UserError

METRIC_LINE = '{"step": %d, "time": 1.0, "metrics": {"loss": 0.5}}\n'


def publish(folder, attempt, name, text):
    parts = Parts(folder, attempt)
    parts.partial(name).write_text(text)
    parts.publish(name)


def test_an_attempt_that_was_superseded_can_commit_neither_a_part_nor_a_record(two_copies):
    (ours, our_folder), (theirs, their_folder) = two_copies
    ours.begin(our_folder, 1)
    publish(our_folder, 1, "a.txt", "first")
    ours.flush(our_folder)
    theirs.refresh(their_folder)
    theirs.begin(their_folder, 2)
    assert (their_folder / "output" / "a.txt").read_text() == "first", "the part was finished"
    with pytest.raises(LeaseLost):
        ours.commit(our_folder / "record.json", {"ours": 1})
    publish(our_folder, 1, "b.txt", "late")
    with pytest.raises(LeaseLost):
        ours.flush(our_folder)
    theirs.flush(their_folder)
    theirs.commit(their_folder / "record.json", {"theirs": 2})
    assert theirs.sizes(their_folder) == {"a.txt": 5}
    ours.refresh(our_folder)
    assert ours.is_committed(our_folder)
    assert json.loads((our_folder / "record.json").read_text()) == {"theirs": 2}
    ours.bucket.overwrite(ours.key(our_folder / "record.json"), b"{}")  # as if its request had arrived late
    ours.refresh(our_folder)
    assert not ours.is_committed(our_folder)


def test_the_last_checkpoint_is_always_in_the_store_and_removed_ones_are_deleted_there(two_copies):
    (ours, our_folder), (theirs, their_folder) = two_copies
    ours.begin(our_folder, 1)
    parts, logs = Parts(our_folder, 1), our_folder / "attempts" / "1"
    logs.mkdir(parents=True)
    seen = []
    for step in (3, 6, 9):
        folder = parts.partial(f"checkpoints/step-{step}")
        (folder / "state").mkdir(parents=True)
        for rank in range(2):
            (folder / "state" / f"rank-{rank}").write_text(f"step {step}, rank {rank}")
        (logs / "metrics.jsonl").write_text(f"{step}")
        parts.publish(f"checkpoints/step-{step}")
        if step == 9:
            parts.remove("checkpoints/step-3")
            parts.remove("checkpoints/step-6")
        with ours.sharing(our_folder, logs):
            pass
        theirs.refresh(their_folder)
        seen.append(sorted(theirs.sizes(their_folder)))
        assert (their_folder / "attempts/1/metrics.jsonl").read_text() == f"{step}"
    assert [len(names) for names in seen] == [2, 4, 2]
    assert seen[-1] == ["checkpoints/step-9/state/rank-0", "checkpoints/step-9/state/rank-1"]
    assert len(ours.bucket.listed("parts/square/")) == 2
    theirs.begin(their_folder, 2)
    assert (their_folder / "output/checkpoints/step-9/state/rank-1").read_text() == "step 9, rank 1"


def test_a_store_slower_than_the_stage_always_lists_a_complete_checkpoint_and_gets_the_newest(
    two_copies, monkeypatch
):
    """While one is uploaded, the stage publishes others and removes even that one."""
    ours, our_folder = two_copies[0]
    ours.begin(our_folder, 1)
    parts, logs = Parts(our_folder, 1), our_folder / "attempts" / "1"
    logs.mkdir(parents=True)
    upload, write = ours.bucket.upload, ours.copy.write
    started, proceed = threading.Event(), threading.Event()
    listed: list[list[str]] = []

    def checkpoint(step):
        folder = parts.partial(f"checkpoints/step-{step}")
        folder.mkdir(parents=True)
        for rank in range(12):
            (folder / f"rank-{rank}").write_text(f"step {step}, rank {rank}")
        parts.publish(f"checkpoints/step-{step}")
        for old in sorted((our_folder / "output/checkpoints").glob("step-*"))[:-2]:
            parts.remove(f"checkpoints/{old.name}")

    def slow(key, path):
        if "step-2" in str(path) or "step-7" in str(path):
            started.set()
            assert proceed.wait(PATIENCE_S)
        upload(key, path)

    def watched(path, content):
        write(path, content)
        listed.append(sorted(content["parts"]))
        keys = {entry.key for entry in ours.bucket.listed("parts/square/")}
        assert file_keys(ours.copy, our_folder, [read_parts(our_folder)]) <= keys

    monkeypatch.setattr(ours.bucket, "upload", slow)
    monkeypatch.setattr(ours.copy, "write", watched)
    checkpoint(1)
    with ours.sharing(our_folder, logs):
        wait_until(lambda: listed)
        checkpoint(2)
        assert started.wait(PATIENCE_S)
        for step in (3, 4, 5, 6):
            checkpoint(step)
        assert (our_folder / "output/checkpoints/step-2/rank-11").exists(), "it is being uploaded"
        assert not (our_folder / "output/checkpoints/step-3").exists()
        proceed.set()
        wait_until(lambda: listed[-1] == ["checkpoints/step-5", "checkpoints/step-6"])
        assert not (our_folder / "output/checkpoints/step-2").exists()
        assert listed[0] == ["checkpoints/step-1"] and all(listed), "at every moment there is one"
        assert ["checkpoints/step-6"] in listed, "the newest comes first"

        started.clear(), proceed.clear()
        checkpoint(7)
        assert started.wait(PATIENCE_S)
        parts.remove("checkpoints")  # as at the end of the stage
        assert not (our_folder / "output/checkpoints/step-6").exists()
        parts.partial("policy").write_text("trained")
        parts.publish("policy")
        proceed.set()
        wait_until(lambda: listed[-1] == ["policy"])
    ours.check_sharing(our_folder)
    ours.flush(our_folder)
    assert list(ours.sizes(our_folder)) == ["policy"]
    assert len(ours.bucket.listed("parts/square/")) == 1


def test_metrics_are_readable_once_the_store_has_them_and_are_dropped_if_it_never_gets_them(two_copies):
    """The last second of a killed driver: in MLflow it would take the steps of the machine that resumes."""
    ours, our_folder = two_copies[0]
    logs = our_folder / "attempts" / "1"
    logs.mkdir(parents=True)
    files = GrowingMetrics(our_folder / "attempts", ours.shared_bytes)
    with ours.sharing(our_folder, logs):
        with (logs / "metrics.jsonl").open("a", buffering=1) as file:
            file.write(METRIC_LINE % 1)
            wait_until(lambda: files.unread(10))
            files.take(files.unread(10))
            ours.logs.upload_changed = lambda logs, at_once: None  # killed: no more uploads
            file.write(METRIC_LINE % 2)
        (logs / "system-a.jsonl").write_text(METRIC_LINE % 7)
    assert files.unread(10) == []
    for storage, folder in two_copies:
        storage.refresh(folder)
        files = GrowingMetrics(folder / "attempts", storage.shared_bytes)
        steps = [line.content.step for line in files.unread(10)]
        assert steps == [1]


def test_a_driver_elsewhere_that_shares_the_copy_keeps_its_newer_files(two_copies):
    """`work` is on a folder that several machines share: a command on one of them only reads."""
    (ours, our_folder), (theirs, their_folder) = two_copies
    log, lease = our_folder / "driver.log", our_folder / LEASE_FILE
    log.write_text("first\n")
    ours.logs.upload_changed(our_folder)
    process = {"host": "elsewhere", "boot_id": "b", "pid_namespace": "p", "pid": 7, "pid_started": "1"}
    holder = Holder(run="r", attempt=1, token="t", since="s", working_copy=ours.copy_id, **process)
    ours.write(lease, holder.content())
    log.write_text("first\nsecond\n")  # not uploaded yet
    ours.refresh(our_folder)
    assert log.read_text() == "first\nsecond\n"
    theirs.refresh(their_folder)  # another copy is not shared
    assert (their_folder / "driver.log").read_text() == "first\n"
    theirs.write(
        their_folder / LEASE_FILE, {**holder.content(), "token": "u", "working_copy": theirs.copy_id}
    )
    ours.refresh(our_folder)  # its lease was taken over: the store is newer
    assert log.read_text() == "first\n" and json.loads(lease.read_text())["token"] == "u"


def test_two_commands_that_fetch_one_file_at_once_both_have_it(two_copies, monkeypatch):
    (ours, our_folder), (theirs, their_folder) = two_copies
    ours.begin(our_folder, 1)
    publish(our_folder, 1, "a.txt", "0123456789" * 100)
    ours.flush(our_folder)
    theirs.refresh(their_folder)
    both, windows = threading.Barrier(2), theirs.bucket.windows

    def in_turns(key, num_bytes):
        for window in windows(key, num_bytes):
            yield window[:500]
            both.wait(timeout=PATIENCE_S)
            yield window[500:]

    monkeypatch.setattr(theirs.bucket, "windows", in_turns)
    files = read_parts(their_folder).files
    with ThreadPoolExecutor(2) as pool:
        fetched = [pool.submit(theirs.fetch, their_folder, files, file_sha256s) for _ in range(2)]
        assert [future.result() for future in fetched] == [None, None]


def test_a_log_may_grow_while_it_is_uploaded(two_copies):
    ours, our_folder = two_copies[0]
    log = our_folder / "driver.log"
    log.write_text("first\n")

    def grow(**_):
        with log.open("a") as file:
            file.write("second\n")

    ours.bucket.client.meta.events.register("before-send.s3.PutObject", grow)
    with ours.sharing(our_folder, our_folder):
        wait_until(lambda: ours.shared_bytes(log))
        assert ours.bucket.get(ours.key(log))[0] == b"first\n"
        assert ours.shared_bytes(log) == len(b"first\n")
    ours.check_sharing(our_folder)


def test_workers_publish_while_the_store_does_not_answer_the_heartbeat(two_copies, server, caplog):
    ours, our_folder = two_copies[0]
    with Leases(ours, beat_s=0.05).acquire(our_folder, "ours") as lease:
        ours.begin(our_folder, lease.attempt)
        server.fault_of = lambda method, path: "503"
        try:
            before = len(server.faults)
            wait_until(lambda: len(server.faults) > before)  # the heartbeat retries, for up to 20 s
            publish(our_folder, lease.attempt, "a.txt", "whole")
            assert "could not be renewed" not in caplog.text, "it waited until the heartbeat gave up"
        finally:
            server.fault_of = lambda method, path: None
    assert (our_folder / "output" / "a.txt").read_text() == "whole"


def test_a_file_that_another_machine_wrote_is_not_overwritten(two_copies):
    (ours, our_folder), (theirs, their_folder) = two_copies
    ours.write(our_folder / "run.json", {"number": 1})
    with pytest.raises(Conflict):
        theirs.write(their_folder / "run.json", {"number": 2})
    theirs.refresh(their_folder)
    theirs.write(their_folder / "run.json", {"number": 2})
    with pytest.raises(Conflict):
        ours.write(our_folder / "run.json", {"number": 3})


def test_a_command_that_hangs_under_the_lock_of_the_runs_is_named(two_copies, monkeypatch):
    (ours, our_folder), (theirs, their_folder) = two_copies
    monkeypatch.setattr(object_store, "_LOCKED_RUNS_WAIT_S", 0.5)
    runs = their_folder.parents[1] / "runs"
    held = pytest.raises(UserError, match=r"/runs is held by run that chooses a run on host")
    with theirs.locked_runs(runs), held, ours.locked_runs(our_folder.parents[1] / "runs"):
        pytest.fail("two machines had the lock")
    with ours.locked_runs(our_folder.parents[1] / "runs"):
        pass


def test_a_large_file_is_uploaded_in_parts_and_a_small_disk_is_refused(two_copies, monkeypatch):
    (ours, our_folder), (theirs, their_folder) = two_copies
    monkeypatch.setattr(bucket, "PART_BYTES", 5 << 20)  # the minimum of S3
    ours.begin(our_folder, 1)
    publish(our_folder, 1, "large.bin", "0123456789" * 1_200_000)
    ours.flush(our_folder)
    theirs.refresh(their_folder)
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(UserError, match=r"work=.* has 0\.0 GB free, square needs 0\.0 GB from s3://"):
            theirs.begin(their_folder, 2)
    theirs.begin(their_folder, 2)
    assert (their_folder / "output" / "large.bin").stat().st_size == 12_000_000


@pytest.mark.parametrize("code", ["RequestTimeout", "IncompleteBody", "BadDigest"])
def test_a_400_that_another_try_may_mend_is_tried_again(two_copies, server, code):
    (ours, _), _ = two_copies
    faults = iter([f"400 {code}"])
    server.fault_of = lambda method, path: next(faults, None)
    ours.bucket.overwrite("a", b"1")
    assert ours.bucket.get("a")[0] == b"1" and server.faults[-1] == f"400 {code}"


@pytest.mark.parametrize(
    "code, message", [("ExpiredToken", "fix the credentials"), ("InvalidArgument", "name an existing bucket")]
)
def test_a_400_that_stays_is_an_error_with_its_remedy(two_copies, server, code, message):
    (ours, _), _ = two_copies
    server.fault_of = lambda method, path: f"400 {code}"
    with pytest.raises(UserError, match=message):
        ours.bucket.overwrite("a", b"1")
    server.fault_of = lambda method, path: None


def test_gc_with_an_old_working_copy_keeps_what_ended_since(machine, monkeypatch):
    """The other machine has seen the stage only before its parts were listed."""
    ours, theirs = machine("a"), machine("b")
    ours.vico("run")
    theirs.vico("status")
    ours.vico("run", "--set", "square.power=3")
    before = ours.stored_outputs()
    for name, value in theirs.environment.items():
        monkeypatch.setenv(name, value)
    assert collect_garbage(theirs.storage, dry_run=False) == []
    assert ours.stored_outputs() == before


def test_gc_fences_a_silent_driver(two_copies):
    (ours, our_folder), (theirs, their_folder) = two_copies
    with Leases(ours).acquire(our_folder, "ours") as lease:
        ours.begin(our_folder, lease.attempt)
        publish(our_folder, lease.attempt, "a.txt", "a")
        ours.flush(our_folder)
        theirs.refresh(their_folder)
        with pytest.raises(LeaseHeld):
            Leases(theirs).revoke({their_folder: "the token of one before"}, "")
        Leases(theirs).revoke({their_folder: lease.holder.token}, "")
        assert theirs.sizes(their_folder) == {"a.txt": 1}
        with pytest.raises(LeaseLost):
            lease.verify()
        with pytest.raises(LeaseLost):
            ours.commit(our_folder / "record.json", {"ours": 1})


def test_an_upload_that_a_kill_left_is_garbage_after_a_day(two_copies, monkeypatch):
    (ours, our_folder), _ = two_copies
    key = f"parts/{ours.key(our_folder)}/{'0' * 64}/large.bin"
    target = {"Bucket": ours.bucket.name, "Key": ours.bucket._full_key(key)}
    created = ours.bucket.client.create_multipart_upload(**target)
    ours.bucket.client.upload_part(**target, UploadId=created["UploadId"], PartNumber=1, Body=b"12345")
    with monkeypatch.context() as patient:  # the test server says 2010 for every upload
        patient.setattr(object_store, "_UNFINISHED_AFTER", timedelta(days=36_500))
        assert ours.garbage([], []) == {}, "it may be in progress"
    [(address, num_bytes)] = ours.garbage([], []).items()
    assert num_bytes == 5 and address.startswith(ours.bucket.address_of(key))
    ours.remove(address, None)
    assert ours.garbage([], []) == {}
