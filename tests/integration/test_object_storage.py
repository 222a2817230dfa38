"""Whole commands on an object store (moto behind a proxy): kills, two machines, faults, refusals, damage."""

import json
import os
import resource
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet
import pytest
import yaml

from pipeline.identity.file_digests import file_sha256s
from pipeline.results.metric_lines import MetricFiles
from pipeline.storage import bucket as objects
from pipeline.storage import object_store as object_storage
from pipeline.storage.folder import Conflict
from pipeline.storage.lease import Leases
from pipeline.storage.lease_file import Holder
from pipeline.storage.lookup import storage_of
from pipeline.storage.object_store import make_working_copy
from pipeline.storage.stored_parts import StoredParts, read_parts
from stages.parts import LEASE_FILE, Parts
from stages.stops import LeaseLost
from tests import s3_server
from tests.integration.demo_pipeline import STAGES as STAGES_OF_VICO
from tests.integration.demo_pipeline import finished, vico
from tests.integration.object_project import BUCKET, ObjectProject
from tests.integration.tiny_pipeline.project import TinyProject, wait_for
from vico.errors import UserError

STAGES = ("draw", "square", "total")
METRIC_LINE = '{"step": %d, "time": 1.0, "metrics": {"loss": 0.5}}\n'
PLACES = ("before", "middle", "unrecorded", "recorded")


@pytest.fixture(scope="module")
def server():
    with s3_server.s3_server() as proxy:
        s3_server.upload(proxy, BUCKET, {})
        yield proxy


@pytest.fixture
def machine(server, tmp_path):
    """A machine with an empty working copy and a prefix of its own; `machine("b")` is another on the same
    prefix."""
    made = []

    def machine(name="a", **more):
        made.append(ObjectProject(tmp_path / name, server, prefix=tmp_path.name, **more))
        return made[-1]

    yield machine
    server.fault_of, server.dropped_headers = lambda method, path: None, ()
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outputs of a run on a local disk that nobody disturbed."""
    made = TinyProject(tmp_path_factory.mktemp("undisturbed"))
    made.vico("run")
    return made.outputs()


def killed(project, place, stage):
    how = {"TINY_KILL": f"{stage}:{2 if stage != 'total' else 0}"}
    if place != "middle":
        how = {"VICO_DIE": f"{place}:{stage}"}
    project.vico("run", code=-signal.SIGKILL, **how)


@pytest.mark.parametrize(
    "stage", ["square", *(pytest.param(s, marks=pytest.mark.slow) for s in ("draw", "total"))]
)
def test_kills_at_every_place_and_another_machine_goes_on(machine, undisturbed, stage):
    """One run, killed at each place in turn, each time gone on with by the other of two machines."""
    machines = [machine("a"), machine("b")]
    for number, place in enumerate(PLACES):
        killed(machines[number % 2], place, stage)
        assert machines[0].status()["state"] == "interrupted"
    machines[0].vico("run")
    assert len(machines[0].runs()) == 1
    assert machines[0].stored_outputs() == undisturbed
    machines[1].vico("run")
    status = machines[1].status()
    assert status["state"] == "done" and all(one["reused"] for one in status["stages"])
    assert json.loads(machines[1].vico("audit", "latest", "--json"))["problems"] == []


def test_parts_of_a_dead_attempt_count_when_they_reached_the_store(machine, undisturbed):
    first, second = machine("a"), machine("b")
    process, _ = first.pause("square:2")
    wait_for(lambda: any(k.startswith("parts/square") for k in first.objects()), process)
    wait_for(lambda: len(json.loads(square_parts(first))["parts"]) == 2, process)
    assert second.status()["state"] == "running", "seen from elsewhere"
    process.kill()
    process.wait()
    keys = {key for key in first.objects() if key.startswith("parts/square")}
    output = second.vico("run")
    assert "square: starts, attempt 2 (unfinished: goes on from attempt 1)" in output
    assert second.stored_outputs() == undisturbed
    assert keys < set(second.objects()), "what was there was not made again"
    work = second.stage("square") / "attempts" / "2" / "metrics.jsonl"
    assert len(work.read_text().splitlines()) == 2, "two parts were left to make"


def square_parts(project):
    return next(v for k, v in project.objects().items() if k.startswith("square") and "parts.json" in k)


def test_another_machine_reuses_what_it_has_never_seen(machine, undisturbed):
    first, second = machine("a"), machine("b")
    first.vico("run")
    plan = second.plan()
    assert {action for action, _ in plan.values()} == {"reuse"}
    assert second.status()["run"] == first.status()["run"]
    assert "total: done in" in second.vico("logs", "latest")
    assert second.outputs() == {}, "planning and reading need no bytes of parts"
    second.vico("run", "--set", "total.digits=3")
    fetched = {name.split("/")[0] for name in second.outputs()}
    assert fetched == set(STAGES), "the inputs of total were fetched"
    differences = json.loads(second.vico("diff", *second.runs(), "--json"))["config"]
    assert "total.digits" in [one["name"] for one in differences]
    (second.stage("square") / "output" / "part-1.txt").write_text("only here")
    second.vico("run", "--set", "total.digits=4")
    name = f"square/{second.stage('square').name}/output/part-1.txt"
    assert second.outputs()[name] == undisturbed[name], "a copy here that is not the store's is fetched again"


def test_two_machines_at_once_are_one_writer(machine, undisturbed):
    first, second = machine("a"), machine("b")
    drivers = [one.start("run", "--wait", "60") for one in (first, second, first, second)]
    for driver in drivers:
        output, errors = driver.communicate(timeout=120)
        assert driver.returncode == 0, (output, errors)
    assert len(first.runs()) == 1
    assert len(first.status()["attempts"]) == 1
    assert first.stored_outputs() == undisturbed
    begun = [key for key in first.objects() if key.endswith("attempt.json")]
    assert len(begun) == 3, "each stage was begun once"


def test_a_second_machine_says_who_holds_the_run(machine):
    first, second = machine("a"), machine("b")
    process, go = first.pause("draw:1")
    second.vico("run", code=1)
    assert f"held by run {first.status()['run']}" in second.errors and "s3://" in second.errors
    go.touch()
    assert process.wait(timeout=60) == 0


@pytest.mark.slow  # the counter is watched for 30 s, twice
def test_a_driver_that_another_machine_took_over_publishes_nothing_more(machine, undisturbed):
    first, second = machine("a"), machine("b")
    process, go = first.pause("square:1")
    os.kill(process.pid, signal.SIGSTOP)
    for key, data in first.objects().items():
        if key.endswith("lease.json"):  # as it looks from another host: only the counter tells
            first.put(key, json.dumps({**json.loads(data), "host": "elsewhere"}).encode())
    second.vico_slowly("run")
    os.kill(process.pid, signal.SIGCONT)
    go.touch()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "taken over" in errors or "no longer" in errors or "another driver" in errors
    assert second.status()["state"] == "done"
    assert second.stored_outputs() == undisturbed
    assert json.loads(second.vico("audit", "latest", "--json"))["problems"] == []


@pytest.fixture
def two_copies(server, tmp_path, monkeypatch):
    """A stage's folder as two machines have it, each with the storage it belongs to."""
    for name, value in s3_server.environment(server, 20).items():
        monkeypatch.setenv(name, value)
    found = []
    for name in "ab":
        make_working_copy(tmp_path / name, f"s3://{BUCKET}/{tmp_path.name}")
        folder = tmp_path / name / "square" / ("f" * 64)
        folder.mkdir(parents=True)
        found.append((storage_of(folder), folder))
    return found


def publish(folder, attempt, name, text):
    parts = Parts(folder, attempt)
    parts.partial(name).write_text(text)
    parts.publish(name)


def test_an_attempt_that_was_taken_over_can_commit_neither_a_part_nor_a_record(two_copies):
    (ours, our_folder), (theirs, their_folder) = two_copies
    ours.begin(our_folder, 1)
    publish(our_folder, 1, "a.txt", "first")
    ours.settle(our_folder)
    theirs.refresh(their_folder)
    theirs.begin(their_folder, 2)
    assert (their_folder / "output" / "a.txt").read_text() == "first", "its part was finished"
    with pytest.raises(LeaseLost):
        ours.commit(our_folder / "record.json", {"ours": 1})
    publish(our_folder, 1, "b.txt", "late")
    with pytest.raises(LeaseLost):
        ours.settle(our_folder)
    theirs.settle(their_folder)
    theirs.commit(their_folder / "record.json", {"theirs": 2})
    assert theirs.sizes(their_folder) == {"a.txt": 5}
    ours.refresh(our_folder)
    assert ours.is_believed(our_folder)
    assert json.loads((our_folder / "record.json").read_text()) == {"theirs": 2}
    ours.bucket.put_anyway(ours.key(our_folder / "record.json"), b"{}")  # as if it had been on its way
    ours.refresh(our_folder)
    assert not ours.is_believed(our_folder)


def test_the_last_checkpoint_is_always_in_the_store_and_dropped_ones_leave_it(two_copies):
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
        with ours.attending(our_folder, logs):
            pass
        theirs.refresh(their_folder)
        seen.append(sorted(theirs.sizes(their_folder)))
        assert (their_folder / "attempts/1/metrics.jsonl").read_text() == f"{step}"
    assert [len(names) for names in seen] == [2, 4, 2]
    assert seen[-1] == ["checkpoints/step-9/state/rank-0", "checkpoints/step-9/state/rank-1"]
    assert len(ours.bucket.listed("parts/square/")) == 2
    theirs.begin(their_folder, 2)
    assert (their_folder / "output/checkpoints/step-9/state/rank-1").read_text() == "step 9, rank 1"


def test_a_store_slower_than_the_stage_always_names_a_whole_checkpoint_and_keeps_up_with_the_newest(
    two_copies, monkeypatch
):
    """While one is brought there, the stage publishes others and removes even that one."""
    ours, our_folder = two_copies[0]
    ours.begin(our_folder, 1)
    parts, logs = Parts(our_folder, 1), our_folder / "attempts" / "1"
    logs.mkdir(parents=True)
    upload, write = ours.bucket.upload, ours.write
    started, go_on = threading.Event(), threading.Event()
    named: list[list[str]] = []

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
            assert go_on.wait(30)
        upload(key, path)

    def watched(path, content):
        write(path, content)
        named.append(sorted(content["parts"]))
        there = {one.key for one in ours.bucket.listed("parts/square/")}
        stored = read_parts(our_folder)
        assert {
            StoredParts(ours, our_folder, list).key(n, f.sha256) for n, f in stored.files.items()
        } <= there

    monkeypatch.setattr(ours.bucket, "upload", slow)
    monkeypatch.setattr(ours, "write", watched)
    checkpoint(1)
    with ours.attending(our_folder, logs):
        wait_for(lambda: named)
        checkpoint(2)
        assert started.wait(30)
        for step in (3, 4, 5, 6):
            checkpoint(step)
        assert (our_folder / "output/checkpoints/step-2/rank-11").exists(), "it is on its way"
        assert not (our_folder / "output/checkpoints/step-3").exists()
        go_on.set()
        wait_for(lambda: named[-1] == ["checkpoints/step-5", "checkpoints/step-6"])
        assert not (our_folder / "output/checkpoints/step-2").exists()
        assert named[0] == ["checkpoints/step-1"] and all(named), "at every moment there is one"
        assert ["checkpoints/step-6"] in named, "the newest comes first"

        started.clear(), go_on.clear()
        checkpoint(7)
        assert started.wait(30)
        parts.remove("checkpoints")  # as at the end of the stage
        assert not (our_folder / "output/checkpoints/step-6").exists()
        parts.partial("policy").write_text("trained")
        parts.publish("policy")
        go_on.set()
        wait_for(lambda: named[-1] == ["policy"])
    ours.check(our_folder)
    ours.settle(our_folder)
    assert list(ours.sizes(our_folder)) == ["policy"]
    assert len(ours.bucket.listed("parts/square/")) == 1


def test_metrics_are_told_on_once_the_store_has_them_and_die_with_the_machine_before(two_copies):
    """A killed driver's last second: in MLflow it would take the steps of the machine that goes on."""
    ours, our_folder = two_copies[0]
    logs = our_folder / "attempts" / "1"
    logs.mkdir(parents=True)
    files = MetricFiles(our_folder / "attempts", ours.shared_bytes)
    with ours.attending(our_folder, logs):
        with (logs / "metrics.jsonl").open("a", buffering=1) as file:
            file.write(METRIC_LINE % 1)
            wait_for(lambda: files.unread(10))
            files.take(files.unread(10))
            ours.ship = lambda logs: None  # killed; what it writes from now on stays here
            file.write(METRIC_LINE % 2)
        (logs / "system-a.jsonl").write_text(METRIC_LINE % 7)
    assert files.unread(10) == []
    for storage, folder in two_copies:
        storage.refresh(folder)
        steps = [line.step for line in MetricFiles(folder / "attempts", storage.shared_bytes).unread(10)]
        assert steps == [1]


def test_a_driver_elsewhere_that_shares_the_copy_keeps_its_newer_files(two_copies):
    """`work` on a folder that several machines share: a command on one of them only looks."""
    (ours, our_folder), (theirs, their_folder) = two_copies
    log, lease = our_folder / "driver.log", our_folder / LEASE_FILE
    log.write_text("first\n")
    ours.ship(our_folder)
    process = {"host": "elsewhere", "boot_id": "b", "pid_namespace": "p", "pid": 7, "pid_started": "1"}
    holder = Holder(run="r", attempt=1, token="t", since="s", working_copy=ours.copy_id, **process)
    ours.write(lease, holder.content())
    log.write_text("first\nsecond\n")  # the driver has not brought it to the store yet
    ours.refresh(our_folder)
    assert log.read_text() == "first\nsecond\n"
    theirs.refresh(their_folder)  # another copy has no part in this
    assert (their_folder / "driver.log").read_text() == "first\n"
    theirs.write(
        their_folder / LEASE_FILE, {**holder.content(), "token": "u", "working_copy": theirs.copy_id}
    )
    ours.refresh(our_folder)  # it was taken over: the store is right
    assert log.read_text() == "first\n" and json.loads(lease.read_text())["token"] == "u"


def test_two_commands_that_fetch_one_file_at_once_both_have_it(two_copies, monkeypatch):
    (ours, our_folder), (theirs, their_folder) = two_copies
    ours.begin(our_folder, 1)
    publish(our_folder, 1, "a.txt", "0123456789" * 100)
    ours.settle(our_folder)
    theirs.refresh(their_folder)
    both, windows = threading.Barrier(2), theirs.bucket.windows

    def in_turns(key, num_bytes):
        for window in windows(key, num_bytes):
            yield window[:500]
            both.wait(timeout=60)
            yield window[500:]

    monkeypatch.setattr(theirs.bucket, "windows", in_turns)
    files = read_parts(their_folder).files
    with ThreadPoolExecutor(2) as pool:
        fetched = [pool.submit(theirs.fetch, their_folder, files, file_sha256s) for _ in range(2)]
        assert [one.result() for one in fetched] == [None, None]


def test_a_log_that_grows_while_it_is_brought_to_the_store(two_copies):
    ours, our_folder = two_copies[0]
    log = our_folder / "driver.log"
    log.write_text("first\n")

    def grow(**_):
        with log.open("a") as file:
            file.write("second\n")

    ours.bucket.client.meta.events.register("before-send.s3.PutObject", grow)
    with ours.attending(our_folder, our_folder):
        wait_for(lambda: ours.shared_bytes(log))
        assert ours.bucket.get(ours.key(log))[0] == b"first\n"
        assert ours.shared_bytes(log) == len(b"first\n")
    ours.check(our_folder)


def test_workers_publish_while_the_store_does_not_answer_the_heartbeat(two_copies, server):
    ours, our_folder = two_copies[0]
    with Leases(ours, beat_s=0.05).acquire(our_folder, "ours") as lease:
        ours.begin(our_folder, lease.attempt)
        server.fault_of = lambda method, path: "503"
        try:
            before = len(server.faults)
            wait_for(lambda: len(server.faults) > before)  # the heartbeat tries, for up to 20 s
            began = time.monotonic()
            publish(our_folder, lease.attempt, "a.txt", "whole")
            assert time.monotonic() - began < 5
        finally:
            server.fault_of = lambda method, path: None
    assert (our_folder / "output" / "a.txt").read_text() == "whole"


def test_a_file_that_another_machine_wrote_is_not_written_over(two_copies):
    (ours, our_folder), (theirs, their_folder) = two_copies
    ours.write(our_folder / "run.json", {"number": 1})
    with pytest.raises(Conflict):
        theirs.write(their_folder / "run.json", {"number": 2})
    theirs.refresh(their_folder)
    theirs.write(their_folder / "run.json", {"number": 2})
    with pytest.raises(Conflict):
        ours.write(our_folder / "run.json", {"number": 3})


def test_a_command_that_hangs_while_it_chooses_its_run_is_named(two_copies, monkeypatch):
    (ours, our_folder), (theirs, their_folder) = two_copies
    monkeypatch.setattr(object_storage, "_CHOOSING_S", 0.5)
    runs = their_folder.parents[1] / "runs"
    held = pytest.raises(UserError, match=r"/runs is held by run that chooses a run on host")
    with theirs.choosing(runs), held, ours.choosing(our_folder.parents[1] / "runs"):
        pytest.fail("two machines chose at once")
    with ours.choosing(our_folder.parents[1] / "runs"):
        pass


def test_a_large_file_goes_in_parts_and_a_small_disk_is_refused(two_copies, monkeypatch):
    (ours, our_folder), (theirs, their_folder) = two_copies
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)  # the least that S3 takes
    ours.begin(our_folder, 1)
    publish(our_folder, 1, "large.bin", "0123456789" * 1_200_000)
    ours.settle(our_folder)
    theirs.refresh(their_folder)
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(UserError, match=r"work=.* has 0\.0 GB free, square needs 0\.0 GB of s3://"):
            theirs.begin(their_folder, 2)
    theirs.begin(their_folder, 2)
    assert (their_folder / "output" / "large.bin").stat().st_size == 12_000_000


def test_failing_requests_and_cut_bodies_are_tried_again(machine, server, undisturbed):
    project = machine()
    server.fault = lambda number: {0: "503", 3: "stop"}.get(number % 7)
    try:
        project.vico("run")
        project.forget()
        project.vico("run", "--set", "total.digits=3")
    finally:
        server.fault = lambda number: None
    assert {"503", "stop"} <= set(server.faults)
    assert json.loads(project.vico("audit", "latest", "--json"))["problems"] == []
    stored = project.stored_outputs()
    assert {name: stored[name] for name in undisturbed} == undisturbed


def test_a_store_that_stays_away_is_one_clear_error_and_the_same_command_goes_on(
    machine, server, undisturbed
):
    project = machine(VICO_REMOTE_PATIENCE_S="2")
    process, go = project.pause("square:1")
    server.fault_of = lambda method, path: "503"
    go.touch()
    _, errors = process.communicate(timeout=60)
    (line,) = errors.strip().splitlines()
    assert process.returncode == 1
    assert "square failed: Unreachable: s3://" in line and "the same command again" in line
    project.vico("status", code=1)
    assert "could not be read in" in project.errors
    server.fault_of = lambda method, path: None
    project.vico("run")
    assert project.stored_outputs() == undisturbed


def test_a_store_that_becomes_read_only_in_mid_write_is_named(machine, server, undisturbed):
    project = machine()
    process, go = project.pause("square:1")
    server.fault_of = lambda method, path: "403" if method == "PUT" else None
    go.touch()
    _, errors = process.communicate(timeout=60)
    (line,) = errors.strip().splitlines()
    assert process.returncode == 2
    assert line.startswith("error: square: s3://") and "may not be written" in line
    server.fault_of = lambda method, path: None
    assert not any("square" in key and key.endswith("record.json") for key in project.objects())
    project.vico("run")
    assert project.stored_outputs() == undisturbed


@pytest.mark.parametrize("header", ["if-none-match", "if-match"])
def test_a_store_without_conditional_writes_is_refused(machine, server, header):
    project = machine()
    server.dropped_headers = (header,)
    project.vico("run", code=2)
    (line,) = project.errors.splitlines()
    assert line.startswith(f"error: storage={project.address}: the store knows no conditional writes")
    assert project.objects() == {}


@pytest.mark.parametrize(
    "site, storage, message",
    [
        ("", "s3://nowhere/x", "NoSuchBucket"),
        ("", "gs://bucket/x", "is no folder and no s3://bucket/prefix"),
        ("", "runs", "has no effect while storage is a folder"),
        ("tracking: {enabled: true}", None, "tracking.uri is not set, and a database cannot lie in"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(machine, site, storage, message):
    project = machine()
    if site:
        (project.folder / "site.yaml").write_text(f"name: tiny\nwork: {project.folder}/work\n{site}\n")
    if storage:
        project.address = storage
    project.vico("run", code=2)
    (line,) = project.errors.splitlines()
    assert message in line


def test_an_object_swapped_for_one_of_equal_size_is_found_and_mended(machine, undisturbed):
    project = machine()
    project.vico("run")
    key = project.key_of("square", "part-2.txt")
    project.put(key, project.objects()[key][::-1])
    (problem,) = json.loads(project.vico("audit", "latest", "--json", code=1))["problems"]
    assert (problem["stage"], problem["kind"]) == ("square", "output_content")
    assert problem["path"] == f"{project.address}/{key}"
    project.forget()
    project.vico("run", "--set", "total.digits=3", code=2)
    assert f"{key} is not what stage square wrote" in project.errors and "--force square" in project.errors
    project.vico("run", "--force", "square")
    assert json.loads(project.vico("audit", "latest", "--json"))["problems"] == []
    assert project.stored_outputs() == undisturbed


@pytest.mark.slow  # a dozen commands
def test_an_object_that_is_gone_and_a_record_edited_by_hand(machine, undisturbed):
    project = machine()
    project.vico("run")
    key = project.key_of("draw", "part-1.txt")
    project.delete(key)
    (problem,) = json.loads(project.vico("audit", "latest", "--json", code=1))["problems"]
    assert (problem["stage"], problem["kind"]) == ("draw", "output_missing")
    assert project.plan()["draw"] == ("run", ["output/part-1.txt is missing; made again"])
    project.vico("run")
    assert project.stored_outputs() == undisturbed
    name = next(k for k in project.objects() if k.startswith("square") and k.endswith("record.json"))
    record = json.loads(project.objects()[name])
    project.put(name, json.dumps({**record, "seconds": 1.0}).encode())
    (problem,) = json.loads(project.vico("audit", "latest", "--json", code=1))["problems"]
    assert (problem["stage"], problem["kind"]) == ("square", "record")
    assert "not the one that was committed" in problem["message"]


@pytest.mark.slow  # a dozen commands
def test_gc_removes_what_no_run_needs_from_the_store(machine):
    project = machine()
    project.vico("run")
    project.vico("run", "--set", "square.power=3")
    project.put(f"parts/draw/{project.stage('draw').name}/{'0' * 64}/part-9.txt", b"of a dead attempt")
    before = project.objects()
    newest = project.runs()[0]
    project.forget()
    would = json.loads(project.vico("gc", "--dry-run", "--drop", newest, "--json"))["removed"]
    assert project.objects() == before
    assert sorted(one["kind"] for one in would) == ["object", "run", "stage", "stage"]
    assert all(one["path"].startswith(project.address) and one["bytes"] for one in would)
    removed = json.loads(project.vico("gc", "--drop", newest, "--json"))["removed"]
    assert removed == would
    left = project.objects()
    assert len([key for key in left if key.endswith("record.json")]) == 3
    assert not any(newest in key or "0" * 64 in key for key in left)
    assert project.outputs_are_whole()
    assert json.loads(project.vico("gc", "--json"))["removed"] == []


def test_reading_commands_and_reuse_are_quick(machine, server):
    project = machine()
    project.vico("run")
    project.vico("run")
    for command, limit_s, most_requests in (("plan", 3, 15), ("run", 5, 30)):
        cpu_s, requests = _children_cpu_s(), server.num_requests
        project.vico(command)
        assert _children_cpu_s() - cpu_s < limit_s
        assert server.num_requests - requests <= most_requests


def _children_cpu_s():
    """Whatever else the machine does, it does not enter this."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow  # MLflow is imported four times
def test_tracking_goes_on_from_another_machine_and_every_step_is_there_once(machine, tmp_path):
    first, second = machine("a"), machine("b")
    for project in (first, second):
        site = (
            (project.folder / "site.yaml")
            .read_text()
            .replace("enabled: false", f"uri: 'sqlite:///{tmp_path}/m.db'")
        )
        (project.folder / "site.yaml").write_text(site)
    first.vico("run", code=-signal.SIGKILL, TINY_KILL="square:2")
    second.vico("run")
    for project in (first, second):
        answer = json.loads(project.vico("audit", "latest", "--json"))
        assert answer["problems"] == []
        assert answer["checked"]["mlflow_runs"] == 4 and answer["checked"]["mlflow_metrics"] >= 9
    assert (tmp_path / "mlartifacts").is_dir()


def test_secrets_stay_in_the_environment(machine):
    project = machine(AWS_SECRET_ACCESS_KEY="planted-secret", AWS_ACCESS_KEY_ID="planted-key")
    project.vico("run")
    planted = [key for key, data in project.objects().items() if b"planted-" in data]
    planted += [
        str(path) for path in project.folder.rglob("*") if path.is_file() and b"planted-" in path.read_bytes()
    ]
    assert planted == []


def test_a_real_stage_gives_the_bytes_that_it_gives_on_a_disk(pipeline, outputs, machine):
    """The label stage of the real pipeline, on ratios that are taken over from elsewhere; killed three times
    and gone on with from an empty working copy."""
    project = machine()
    write_real(project, pipeline, outputs, ("shard", "consistency", "ratio"))
    for place in PLACES[1:]:
        run_real(project, "label", f"{place}:label", code=-signal.SIGKILL)
        project.forget()
    run_real(project, "label")
    assert made_by("label", project) == contents(outputs["label"])


def test_export_samples_and_a_recipe_come_from_the_store(pipeline, outputs, machine):
    """All stages are taken over from elsewhere; then nothing of them is on this machine."""
    project = machine()
    write_real(project, pipeline, outputs, STAGES_OF_VICO)
    run_real(project, "export")
    project.forget()
    real(project, "export", "latest", "model", "--layout", "hf")
    exported, stored = project.folder / "model", outputs["export"] / "model"
    assert (exported / "model.safetensors").read_bytes() == (stored / "model.safetensors").read_bytes()
    index = pyarrow.parquet.read_table(outputs["label"] / "labels.parquet", columns=["key"])
    found = json.loads(real(project, "audit", "latest", "--sample", str(index["key"][0]), "--json"))
    assert found["labels"], "the row of the table"
    recipe = json.loads(real(project, "reproduce", "latest", "--out", "again.yaml", "--json"))
    assert recipe["command"].startswith("vico run ")


def real(project, *arguments):
    options = {"cwd": project.folder, "extra_environment": project.environment}
    code, output, errors = finished(
        vico(*arguments, "--site", "site.yaml", "--storage", project.address, **options)
    )
    assert code == 0, errors[-2000:]
    return output


@pytest.mark.slow  # starts Ray twice
def test_a_training_goes_on_elsewhere_from_the_checkpoint_in_the_store(pipeline, outputs, machine):
    first, second = machine("a"), machine("b")
    for project in (first, second):
        write_real(project, pipeline, outputs, ("shard",))
    run_real(first, "consistency", "stored:consistency", code=-signal.SIGKILL)
    shutil.rmtree(first.folder)
    run_real(second, "consistency")
    assert made_by("consistency", second) == contents(outputs["consistency"])
    log = (second.stage("consistency") / "attempts" / "2" / "rank-0.log").read_text()
    assert "goes on from step" in log
    objects = second.objects()
    assert not any(key.startswith("parts/consistency") and "mp_rank" in key for key in objects)
    assert json.loads(second.vico("gc", "--dry-run", "--json"))["removed"] == []


def write_real(project, pipeline, outputs, adopted):
    """The real pipeline's file, with results that are taken over."""
    content = yaml.safe_load(pipeline[0].read_text())
    content["inputs"]["adopt"] = {stage: str(outputs[stage]) for stage in adopted}
    (project.folder / "real.yaml").write_text(yaml.safe_dump(content))
    project.site("train: {checkpoint_every_steps: 3}\n")


def run_real(project, until, dies="", code=0):
    command = ["run", "real.yaml", "--until", until, "--site", "site.yaml", "--storage", project.address]
    process = vico(
        *command, dies=dies or "nowhere", cwd=project.folder, extra_environment=project.environment
    )
    found, output, errors = finished(process)
    assert found == code, (output[-2000:], errors[-2000:])


def made_by(stage, project):
    stored = project.stored_outputs().items()
    return {name.partition("/output/")[2]: data for name, data in stored if name.startswith(f"{stage}/")}


def contents(output):
    files = [path for path in output.rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}
