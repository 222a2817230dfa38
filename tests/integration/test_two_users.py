"""One storage and two real users: with a group and umask 002 they share it, without they get one line."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.tiny_pipeline.project import ROOT, TinyProject
from tests.waiting import PATIENCE_S

ALICE, BOB, GROUP = 64001, 64002, 64100
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of two users")


class Users:
    """The tiny project in a folder that all can read; its commands run as one of the users."""

    def __init__(self, folder: Path):
        self.project = TinyProject(folder / "project")
        self.homes = {uid: folder / str(uid) for uid in (ALICE, BOB)}
        for uid, home in self.homes.items():
            home.mkdir()
            os.chown(home, uid, uid)
        self.python = self._usable_python()

    def _usable_python(self) -> str:
        """Return an interpreter of this version that other users can start; "" if there is none."""
        for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
            try:
                if not self.start(BOB, 0o002, [python, "-c", "import pipeline.cli, tests"]).returncode:
                    return python
            except OSError:
                continue
        return ""

    @property
    def store(self) -> Path:
        return self.project.storage

    def make_store(self, uid: int, gid: int, mode: int) -> None:
        self.store.mkdir()
        os.chown(self.store, uid, gid)
        self.store.chmod(mode)

    def start(self, uid: int, umask: int, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.project.folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")]),
                "PYTHONDONTWRITEBYTECODE": "1",
                "HOME": str(self.homes[uid]),
            },
            user=uid,
            group=uid,
            extra_groups=[GROUP],
            umask=umask,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def vico(self, uid: int, command: str, *arguments: str, umask: int = 0o002, code: int = 0) -> str:
        """Return what a command of this user prints; it must end with this exit code and no traceback."""
        config = ["pipeline.yaml"] if command in ("run", "plan") else []
        options = ["--site", "site.yaml", "--storage", str(self.store)]
        module = "tests.integration.tiny_pipeline.command"
        ended = self.start(uid, umask, [self.python, "-m", module, command, *config, *arguments, *options])
        output = ended.stdout + ended.stderr
        assert "Traceback" not in output, output
        assert ended.returncode == code, output
        return output


@pytest.fixture
def users() -> Iterator[Users]:
    folder = Path(tempfile.mkdtemp(prefix="vico-test-users-"))
    folder.chmod(0o755)  # pytest's own folders are closed to others
    try:
        users = Users(folder)
        if not users.python:
            pytest.skip("other users cannot read the sources or the environment of this test")
        yield users
    finally:
        shutil.rmtree(folder)


def test_users_of_one_group_share_a_storage(users):
    """Each runs, replaces, resumes and removes what the other has written."""
    users.make_store(ALICE, GROUP, 0o2775)
    users.vico(ALICE, "run")
    assert "reuse" in users.vico(BOB, "plan")
    users.vico(BOB, "run", "--force", "square")
    users.vico(ALICE, "run", "--force", "total")
    users.vico(BOB, "audit", "latest")
    runs = sorted(path.name for path in users.store.glob("runs/2*"))
    users.vico(BOB, "gc", "--drop", runs[0])
    users.vico(ALICE, "run")
    owners = {path.stat().st_uid for path in users.store.rglob("*")}
    assert owners == {ALICE, BOB}
    assert {path.stat().st_gid for path in users.store.rglob("*")} == {GROUP}


def test_what_another_user_keeps_to_himself_is_one_line(users):
    """The folder is open to the group, and Alice's umask is not."""
    users.make_store(ALICE, GROUP, 0o2775)
    users.vico(ALICE, "run", umask=0o022)
    users.vico(BOB, "plan")
    users.vico(BOB, "status")
    users.vico(BOB, "audit", "latest")
    for command in (("run",), ("run", "--force", "square"), ("gc",)):
        output = users.vico(BOB, *command, code=2)
        [line] = [line for line in output.splitlines() if line.startswith("error")]
        assert str(users.store) in line and f"user {ALICE}" in line and "umask 002" in line, output


@pytest.mark.parametrize("command", ["run", "plan", "status", "audit latest", "gc"])
def test_a_storage_that_is_closed_is_one_line(users, command):
    users.make_store(ALICE, ALICE, 0o700)
    users.vico(ALICE, "run", umask=0o077)
    output = users.vico(BOB, *command.split(), code=2)
    assert str(users.store) in output and len(output.strip().splitlines()) == 1, output
