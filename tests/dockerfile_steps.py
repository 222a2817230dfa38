"""Run the steps of a Dockerfile in a chroot, for machines without a container engine. Needs root.

    python -m tests.dockerfile_steps docker/Dockerfile.cpu ROOT [NAME=VALUE ...]

ROOT is an unpacked base system (`debootstrap --variant=minbase bookworm ROOT`); NAME=VALUE are build
arguments. Package registries are those that pip and apt use on this machine.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

_SHARED_FILES = ("/etc/resolv.conf", "/etc/pip.conf")
_SHARED_FOLDERS = ("/opt", "/etc/xdg/pip")
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
_KEPT_VARIABLES = re.compile(r"(PIP_.*|.*_proxy|.*_PROXY)")


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """Yield (instruction, arguments), with continued lines joined and comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    for line in text.splitlines():
        if line.strip():
            name, _, arguments = line.partition(" ")
            yield name, arguments.strip()


class Build:
    """The state of a build: environment, user and working directory."""

    def __init__(self, root: Path, context: Path, arguments: Mapping[str, str]) -> None:
        self.root, self.context, self.arguments = root, context, dict(arguments)
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.user, self.folder = "root", "/"

    def run(self, dockerfile: Path) -> int:
        """Run all instructions; return the number of RUN steps. Raises CalledProcessError."""
        steps = 0
        for name, text in instructions(dockerfile):
            print(f"{name} {text}", flush=True)
            if name == "RUN":
                self._run(text)
                steps += 1
            elif name == "COPY":
                self.copy(*shlex.split(text))
            elif name == "ENV":
                pairs = (pair.partition("=") for pair in shlex.split(text))
                self.environment |= {key: self._expanded(value) for key, _, value in pairs}
            elif name == "ARG":
                key, _, default = text.partition("=")
                self.environment[key] = self.arguments.get(key, default)
            elif name == "USER":
                self.user = text
            elif name == "WORKDIR":
                self.folder = text
            elif name != "FROM":
                raise ValueError(f"{name} is not known here")
        return steps

    def _expanded(self, text: str) -> str:
        return re.sub(r"\$(\w+)", lambda match: self.environment.get(match[1], ""), text)

    def copy(self, *paths: str) -> None:
        """Copy files and folders of the context as COPY does; the last path is the target."""
        *sources, target = paths
        for source in sources:
            destination = self.root / target.lstrip("/")
            if (self.context / source).is_dir():
                # Docker keeps links: those in pipeline/starter lead to folders that are copied beside it.
                shutil.copytree(self.context / source, destination, symlinks=True, dirs_exist_ok=True)
            else:
                destination.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.context / source, destination)

    def _run(self, text: str) -> None:
        """Run a command in the chroot, in mount and process namespaces of its own."""
        mounts = ["set -e", f"mount -t proc proc {self.root}/proc", f"mount --rbind /dev {self.root}/dev"]
        for path in (*_SHARED_FILES, *_SHARED_FOLDERS):
            if path == "/opt":
                shared = [f"/opt/{folder.name}" for folder in Path("/opt").iterdir() if folder.is_dir()]
            else:
                shared = [path]
            for name in shared:
                inside = self.root / name.lstrip("/")
                if Path(name).is_dir():
                    mounts.append(f"mkdir -p {inside} && mount --bind {name} {inside}")
                elif Path(name).exists():
                    mounts.append(
                        f"mkdir -p {inside.parent} && touch {inside} && mount --bind {name} {inside}"
                    )
        kept = {name: value for name, value in os.environ.items() if _KEPT_VARIABLES.fullmatch(name)}
        # A copy: the package ca-certificates writes its own bundle.
        shutil.copy(_CERTIFICATES, self.root / "tmp" / "certificates.crt")
        kept |= {"PIP_CERT": "/tmp/certificates.crt", "SSL_CERT_FILE": "/tmp/certificates.crt"}
        variables = [f"{name}={value}" for name, value in {**kept, **self.environment}.items()]
        enter = ["chroot", f"--userspec={self.user}", str(self.root), "/usr/bin/env", "-i", "HOME=/tmp"]
        inner = [*enter, *variables, "/bin/sh", "-c", f"cd {self.folder} && {text}"]
        script = "\n".join([*mounts, f"exec {shlex.join(inner)}"])
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]
        subprocess.run(command, check=True)


def main(arguments: list[str]) -> None:
    dockerfile, root, *pairs = arguments
    given = dict(pair.split("=", 1) for pair in pairs)
    steps = Build(Path(root), Path(__file__).parents[1], given).run(Path(dockerfile))
    print(f"{steps} RUN steps done")


if __name__ == "__main__":
    main(sys.argv[1:])
