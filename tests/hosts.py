"""Hosts on one machine: each has its own network, process numbers and host name. Needs root and iproute2.

A host's programs see the files of this machine and only their own processes. So `ray stop` on a host ends
only the Ray of that host.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import wait_until

needs_hosts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nsenter") is None,
    reason="hosts on one machine need root, iproute2 and util-linux",
)
_NAMESPACES = ["--net", "--mount", "--pid", "--uts"]


@dataclass
class Host:
    """A host: `address` on the network of its `Hosts`."""

    name: str
    address: str
    pid: int
    """Its first process; the host ends with it."""
    started: list[subprocess.Popen[Any]] = field(default_factory=list)

    def command(self, *words: object) -> list[str]:
        """Return the words for this machine that run a command on the host, in this working directory."""
        here = ["env", "-C", os.getcwd()]
        return ["nsenter", f"--target={self.pid}", *_NAMESPACES, "--", *here, *map(str, words)]

    def start(self, *words: object, **options: Any) -> subprocess.Popen[Any]:
        process = subprocess.Popen(self.command(*words), **options)
        self.started.append(process)
        return process

    def run(self, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        options = {"capture_output": True, "text": True, "timeout": 600, **options}
        return subprocess.run(self.command(*words), **options)

    def kill(self) -> None:
        """End the host as a power cut does."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        for process in self.started:
            process.wait()


@contextmanager
def hosts(
    names: Sequence[str], folder: Path, *, private: Mapping[str, Sequence[Path]] | None = None
) -> Iterator[dict[str, Host]]:
    """Yield hosts by name, at 10.77.0.2 and on, which see each other but not this machine's network.

    `private`: name -> folders that the host has for itself, empty at first.
    """
    made: dict[str, Host] = {}
    keepers: list[subprocess.Popen[bytes]] = []
    table = "".join(f"10.77.0.{number} {name}\n" for number, name in enumerate(names, 2))
    names_file = folder / "hosts"
    names_file.write_text(f"127.0.0.1 localhost\n{table}")
    try:
        switch = _keeper("switch", folder, [])
        keepers.append(switch[0])
        _in_network(switch[1], "ip", "link", "add", "bridge0", "type", "bridge")
        _in_network(switch[1], "ip", "link", "set", "bridge0", "up")
        for number, name in enumerate(names, 2):
            keeper, pid = _keeper(name, folder, [str(path) for path in (private or {}).get(name, ())])
            keepers.append(keeper)
            made[name] = Host(name, f"10.77.0.{number}", pid)
            ends = [f"end{number}", "netns", str(switch[1])]
            _in_network(pid, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", *ends)
            _in_network(pid, "ip", "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            _in_network(pid, "ip", "link", "set", "eth0", "up")
            _in_network(switch[1], "ip", "link", "set", f"end{number}", "master", "bridge0", "up")
        yield made
    finally:
        for host in made.values():
            host.kill()
        for keeper in keepers:
            keeper.kill()
            keeper.wait()


def _keeper(name: str, folder: Path, private: Sequence[str]) -> tuple[subprocess.Popen[bytes], int]:
    """Start a host's first process; return (the process that started it, its number on this machine)."""
    ready = folder / f"{name}.ready"
    ready.unlink(missing_ok=True)
    script = [
        "set -e",
        "mount -t proc proc /proc",
        f"mount --bind {folder / 'hosts'} /etc/hosts",
        *(f"mkdir -p {path} && mount -t tmpfs tmpfs {path}" for path in private),
        f"hostname {name}",
        "ip link set lo up",
        f"touch {ready}",
        "exec bash -c 'while :; do sleep 1000 & wait $!; done'",  # bash reaps the orphans of the host
    ]
    keeper = subprocess.Popen(
        ["unshare", *_NAMESPACES, "--fork", "--kill-child", "sh", "-c", "\n".join(script)]
    )
    wait_until(ready.exists, keeper, or_else=lambda: f"for host {name}")
    children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()
    return keeper, int(children[0])


def _in_network(pid: int, *words: str) -> None:
    subprocess.run(["nsenter", f"--target={pid}", "--net", "--", *words], check=True)
