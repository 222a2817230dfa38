"""Every dependency has a pin and a licence that is allowed, and its packages are listed and audited by
tools."""

import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.identity.provenance import locked_versions
from tests.supply import named_packages, needed_packages, normal
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
ALLOWED = frozenset(
    [
        "0BSD",
        "AFL-2.1",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSL-1.0",
        "CC0-1.0",
        "CNRI-Python",
        "ISC",
        "LLVM-exception",
        "MIT",
        "MIT-0",
        "MIT-CMU",
        "MPL-2.0",
        "PSF-2.0",
        "Python-2.0",
        "Unlicense",
        "Zlib",
    ]
)
"""They permit use and redistribution beside code under Apache-2.0. MPL-2.0 asks for the source of its own
files only."""
TOOLS_ONLY = {"codespell": "GPL-2.0-only"}
"""Programs that `make lint` starts and that nothing imports or ships."""
WITHOUT_METADATA = {"deepspeed": "Apache-2.0", "huey": "MIT", "skops": "MIT"}
"""Licences by the files in the packages, which their metadata do not name."""
NOT_PINNED = ("nvidia-", "cuda-", "triton", "pip")
"""Packages that a CUDA build of torch brings and pins itself; pip comes with Python and reads the pins."""

SBOM_ONLY = frozenset(
    [
        "arrow",
        "chardet",
        "cyclonedx-bom",
        "fqdn",
        "isoduration",
        "jsonpointer",
        "lark",
        "lxml",
        "rfc3339-validator",
        "rfc3986-validator",
        "rfc3987-syntax",
        "tzdata",
        "uri-template",
        "webcolors",
    ]
)
"""What only the extra `sbom` needs."""


def test_every_dependency_has_a_pin_and_is_installed_with_it():
    pins = {normal(name): version for name, version in locked_versions().items()}
    assert [required.name for required in named_packages() if normal(required.name) not in pins] == []
    wrong = [
        f"{package.name} {package.version}, pinned {pins.get(package.name)}"
        for package in needed_packages()
        if not package.name.startswith(NOT_PINNED) and package.version != pins.get(package.name)
    ]
    assert wrong == []
    too_new = [
        r.name for r in named_packages() if not r.specifier.contains(pins[normal(r.name)], prereleases=True)
    ]
    assert too_new == [], "pyproject.toml excludes the pinned version"


def test_the_lock_has_the_pinned_versions_with_hashes():
    """`wheel` is only built with. Of the extras, `gpu` is not locked, because flash-attn compiles for one
    CUDA, and `sbom`, which belongs into an environment of its own."""
    pins = {normal(name): version for name, version in locked_versions().items()}
    entries = re.findall(
        r"^([\w.-]+)==(\S+)((?:.*\\\n)*.*)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE
    )
    locked = {normal(name): version for name, version, _ in entries}
    assert {name: locked[name] for name in pins.keys() & locked.keys()}.items() <= pins.items()
    assert [n for n in locked.keys() - pins.keys() if not n.startswith(NOT_PINNED)] == []
    assert pins.keys() - locked.keys() == {"wheel", "flash-attn", "nvidia-ml-py", *SBOM_ONLY}
    assert [name for name, _, hashes in entries if "--hash=sha256:" not in hashes] == []


def test_nothing_makes_imports_of_ray_slow():
    """jsonschema imports rfc3987-syntax if it is installed, and that builds a grammar for seconds."""
    code = "import sys, ray; print('jsonschema' in sys.modules, 'rfc3987_syntax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], "pip uninstall rfc3987-syntax"


def test_every_licence_is_allowed():
    packages = [package for package in needed_packages() if not package.name.startswith(NOT_PINNED)]
    assert len(packages) > 150
    unclear = [
        package.name for package in packages if not package.licences and package.name not in WITHOUT_METADATA
    ]
    assert unclear == []
    refused = {
        package.name: licence
        for package in packages
        for licence in package.licences
        if licence not in ALLOWED and TOOLS_ONLY.get(package.name) != licence
    }
    assert refused == {}
    for name, licence in TOOLS_ONLY.items():
        code = [
            path
            for folder in ("vico", "data_prep", "cluster", "stages", "pipeline")
            for path in (ROOT / folder).rglob("*.py")
            if f"import {name}" in path.read_text()
        ]
        assert code == [], f"{licence}: {name} is a program of the checks"


class Advisories(BaseHTTPRequestHandler):
    """Answers as the OSV service does, with one advisory, about the pinned version of a package."""

    package, version = "", ""

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer: dict[str, object] = {}
        if (normal(query["package"]["name"]), query["version"]) == (self.package, self.version):
            affected = {"package": query["package"], "versions": [self.version], "ranges": []}
            answer = {
                "vulns": [
                    {
                        "id": "PLANTED-1",
                        "summary": "planted",
                        "details": "planted",
                        "aliases": [],
                        "modified": "2026-01-01T00:00:00Z",
                        "published": "2026-01-01T00:00:00Z",
                        "affected": [affected],
                    }
                ]
            }
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""


@pytest.mark.slow
@pytest.mark.parametrize("package, code", [("", 0), ("requests", 1)])
def test_make_advisories_finds_an_advisory_of_a_pinned_version(package, code):
    Advisories.package, Advisories.version = package, locked_versions().get(package, "")
    with ThreadingHTTPServer(("127.0.0.1", 0), Advisories) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [*_make("advisories"), f"ADVISORIES=http://127.0.0.1:{server.server_port}/v1/query"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
        server.shutdown()
    assert (done.returncode != 0) == bool(code), done.stdout + done.stderr
    assert ("PLANTED-1" in done.stdout + done.stderr) == bool(code), done.stdout + done.stderr


@pytest.mark.slow
def test_make_sbom_lists_every_package_with_its_version(tmp_path):
    file = tmp_path / "sbom.json"
    subprocess.run(
        [*_make("sbom"), f"SBOM={file}"], cwd=ROOT, check=True, capture_output=True, timeout=PATIENCE_S
    )
    content = json.loads(file.read_text())
    assert content["bomFormat"] == "CycloneDX" and content["metadata"]["component"]["name"] == "vico"
    listed = {normal(one["name"]): one["version"].partition("+")[0] for one in content["components"]}
    assert {package.name: package.version for package in needed_packages()}.items() <= listed.items()


def _make(target: str) -> list[str]:
    """Return the command for a target with this environment as it is, instead of one that make sets up."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    ready = ["--old-file", f"{sys.prefix}/.installed", "--old-file", f"{sys.prefix}/.extensions"]
    return [make, "--no-print-directory", *ready, target, f"VENV={sys.prefix}"]
