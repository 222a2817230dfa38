"""Leases between real processes; other machines are represented by the files that they would write."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from pipeline.storage.folder import FolderStorage
from pipeline.storage.lease_file import Holder, read_lease
from pipeline.storage.leases import LeaseHeld, Leases
from stages.durable_files import locked
from stages.parts import LEASE_FILE, Parts
from stages.stops import LeaseLost
from tests.waiting import PATIENCE_S, wait_for_end, wait_until
from vico.errors import UserError

LEASES = Leases(FolderStorage())
NEVER_STALE = Leases(FolderStorage(), stale_s=math.inf)
"""Takes over only what a dead process held, never what was silent for long."""
HOLDER = """
import sys, time
from pathlib import Path
from pipeline.storage.folder import FolderStorage
from pipeline.storage.leases import Leases
lease = Leases(FolderStorage(), beat_s=0.05).acquire(Path(sys.argv[1]), "their-run")
print(lease.attempt, flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the lease of tmp_path."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert process.stdout.readline().strip() == "1"
    yield process
    process.kill()
    process.communicate()


def edit(folder, **fields):
    path = folder / LEASE_FILE
    edited = path.with_suffix(".edited")  # others never read half a file
    edited.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    os.replace(edited, path)


def suspend(folder, pid, kill=os.kill):
    """Suspend a holder between two beats: within a beat it would hold the lock that others wait for."""
    with locked(folder):
        kill(pid, signal.SIGSTOP)


def test_a_live_holder_is_named(tmp_path, other):
    with pytest.raises(LeaseHeld, match=f"held by run their-run on host .*, pid {other.pid}, since 2"):
        LEASES.acquire(tmp_path, "ours")


def test_the_lease_of_a_dead_process_on_this_machine_is_taken_over_at_once(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    wait_for_end([psutil.Process(other.pid)])  # nobody has asked for its exit code
    with NEVER_STALE.acquire(tmp_path, "ours") as lease:
        assert lease.attempt == 2
        assert read_lease(tmp_path).run == "ours"


def test_a_pid_that_now_belongs_to_another_process_holds_nothing(tmp_path, other):
    suspend(tmp_path, other.pid)
    edit(tmp_path, pid_started="12345")
    with LEASES.acquire(tmp_path, "ours") as lease:
        assert lease.attempt == 2


@pytest.fixture(params=[FileNotFoundError, PermissionError])
def hidden(monkeypatch, request):
    """Act as if /proc were mounted with hidepid=2 or 1 and the holder belonged to another user."""

    def unseen(pid):
        raise request.param(f"/proc/{pid}/stat")

    def of_another_user(pid, number):
        real(pid, 0)
        raise PermissionError(pid)

    real = os.kill
    monkeypatch.setattr("pipeline.storage.lease_file.pid_started", unseen)
    monkeypatch.setattr("pipeline.storage.lease_file.os.kill", of_another_user)
    return real


def test_a_live_holder_that_proc_hides_is_not_taken_over(tmp_path, other, hidden):
    assert not read_lease(tmp_path).is_dead()
    with pytest.raises(LeaseHeld, match=f"pid {other.pid}"):
        Leases(FolderStorage(), stale_s=5.0).acquire(tmp_path, "ours")
    with pytest.raises(LeaseHeld, match=f"pid {other.pid}"):
        LEASES.refuse_live_holders([tmp_path], "stop it")


def test_the_lease_of_a_holder_that_proc_hides_is_taken_over_when_its_counter_stops(tmp_path, other, hidden):
    suspend(tmp_path, other.pid, hidden)
    started = time.monotonic()
    with Leases(FolderStorage(), stale_s=1.0).acquire(tmp_path, "ours") as lease:
        assert time.monotonic() - started >= 1.0
        assert lease.attempt == 2


def test_a_dead_holder_is_recognised_although_proc_hides_others(tmp_path, other, hidden):
    hidden(other.pid, signal.SIGKILL)
    other.wait()
    NEVER_STALE.acquire(
        tmp_path, "ours", on_wait=lambda holder: pytest.fail("waits for a dead process")
    ).release()


@pytest.mark.parametrize("field", ["host", "boot_id", "pid_namespace"])
def test_the_lease_of_a_holder_elsewhere_is_taken_over_only_when_its_counter_stops(tmp_path, other, field):
    suspend(tmp_path, other.pid)
    edit(tmp_path, **{field: "elsewhere"}, pid=2**22 + 1)  # no process here has this number
    started = time.monotonic()
    with Leases(FolderStorage(), stale_s=1.0).acquire(tmp_path, "ours") as lease:
        assert time.monotonic() - started >= 1.0
        assert lease.attempt == 2


def test_a_holder_elsewhere_whose_counter_moves_is_alive(tmp_path, other):
    stop = threading.Event()
    suspend(tmp_path, other.pid)
    edit(tmp_path, host="elsewhere")

    def beat():
        for counter in range(1000, 2000):
            if stop.wait(0.1):
                return
            edit(tmp_path, counter=counter)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(LeaseHeld, match="on host elsewhere"):
            Leases(FolderStorage(), stale_s=5.0).acquire(tmp_path, "ours")
    finally:
        stop.set()
        beating.join()


def silent_holder(folder):
    """Write the lease of a driver on another host that no longer renews it; return its token."""
    folder.mkdir()
    process = {"host": "elsewhere", "boot_id": "b", "pid_namespace": "p", "pid": 7, "pid_started": "1"}
    holder = Holder(run="theirs", attempt=1, token=f"token of {folder.name}", since="2026", **process)
    holder.write(folder / LEASE_FILE)
    return holder.token


@pytest.mark.parametrize("removed", ["lease.json", "the folder"])
def test_a_lease_that_disappears_while_it_is_watched_holds_nothing(tmp_path, removed):
    """As when another `vico gc`, or a user, removes the folder of a run that was killed elsewhere."""
    going, staying = tmp_path / "going", tmp_path / "staying"
    silent_holder(going)
    stale_tokens = {staying: silent_holder(staying)}
    remove = (going / LEASE_FILE).unlink if removed == LEASE_FILE else lambda: shutil.rmtree(going)
    timer = threading.Timer(0.4, remove)
    timer.start()
    leases = Leases(FolderStorage(), stale_s=1.5)
    assert leases.refuse_live_holders([going, staying], "stop it") == stale_tokens
    timer.join()
    leases.refuse_new_holders([going, staying], stale_tokens, "stop it")


def test_a_holder_that_came_while_others_were_watched_is_refused(tmp_path):
    folder = tmp_path / "run"
    token = silent_holder(folder)
    LEASES.refuse_new_holders([folder], {folder: token}, "stop it")
    edit(folder, token="another")
    with pytest.raises(LeaseHeld, match="run theirs on host elsewhere, pid 7, since 2026; stop it"):
        LEASES.refuse_new_holders([folder], {folder: token}, "stop it")


def test_waiting_ends_when_the_holder_releases_the_lease(tmp_path):
    holders = []
    first = LEASES.acquire(tmp_path, "first")

    def on_wait(holder):
        holders.append(holder)
        threading.Thread(target=first.release).start()

    with LEASES.acquire(tmp_path, "second", wait_s=PATIENCE_S, on_wait=on_wait) as second:
        assert second.attempt == 2
    assert [holder.run for holder in holders] == ["first"]


def test_the_counter_grows_while_the_lease_is_held(tmp_path):
    with Leases(FolderStorage(), beat_s=0.02).acquire(tmp_path, "ours"):
        before = read_lease(tmp_path).counter
        wait_until(lambda: read_lease(tmp_path).counter > before)
    assert read_lease(tmp_path).released


def test_a_driver_that_lost_the_lease_notices_and_can_write_nothing(tmp_path):
    lease = Leases(FolderStorage(), beat_s=0.05).acquire(tmp_path, "ours")
    parts = Parts(tmp_path, lease.attempt)
    parts.partial("part").write_text("late")
    with locked(tmp_path):
        edit(tmp_path, token="another", attempt=2, run="theirs")
    with pytest.raises(LeaseLost, match="run theirs"), lease.writing():
        pytest.fail("wrote under a lost lease")
    with pytest.raises(LeaseLost):
        parts.publish("part")
    wait_until(lambda: lease.lost)
    lease.release()
    assert not read_lease(tmp_path).released  # the other driver's lease is not touched


def test_workers_of_an_ended_or_earlier_attempt_cannot_publish(tmp_path):
    lease = LEASES.acquire(tmp_path, "ours")
    old = Parts(tmp_path, lease.attempt)
    lease.next_attempt()
    new = Parts(tmp_path, lease.attempt)
    for parts in (old, new):
        parts.partial("part").write_text("x")
    with pytest.raises(LeaseLost):
        old.publish("part")
    lease.release()
    with pytest.raises(LeaseLost):
        new.publish("part")


def test_attempt_numbers_are_never_used_twice(tmp_path):
    for number in (1, 2, 3):
        with LEASES.acquire(tmp_path, "r") as lease:
            assert lease.attempt == number
    with LEASES.acquire(tmp_path, "r", min_attempt=9) as lease:
        assert lease.attempt == 9


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is damaged"),
        ('{"schema": 1}', "is damaged"),
        ('{"schema": 2}', "has schema 2, this vico reads 1"),
        ("[]", "a list instead of an object"),
    ],
)
def test_a_damaged_lease_is_named_with_a_remedy(tmp_path, content, message):
    (tmp_path / LEASE_FILE).write_text(content)
    with pytest.raises(UserError) as error:
        LEASES.acquire(tmp_path, "ours")
    assert message in str(error.value) and str(tmp_path / LEASE_FILE) in str(error.value)
