"""A folder with a config of the tiny stages, and real processes of the command line in it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.results.records import record_digest
from tests.waiting import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[3]
CONFIG = """
seed: 7
inputs:
  records: {format: demo, num_samples: 4}
  model: model
draw: {scale: 1e-1}
"""

TRACKED = "name: tiny\ntracking: {interval_s: 0.1, finish_timeout_s: 300}\n"
"""A site whose runs wait for MLflow on a slow machine too, its import and a new database included."""


@dataclass
class TinyProject:
    """`close` kills commands that are still running."""

    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "pipeline.yaml").write_text(CONFIG)
        (self.folder / "site.yaml").write_text("name: tiny\ntracking: {enabled: false}\n")

    @property
    def storage(self) -> Path:
        return self.folder / "store"

    @property
    def storage_option(self) -> str:
        return str(self.storage)

    def start(self, command: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start `vico COMMAND ...` as a process; run and plan get the config file."""
        config = ["pipeline.yaml"] if command in ("run", "plan") else []
        options = ["--site", "site.yaml", "--storage", self.storage_option]
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.integration.tiny_pipeline.command",
                command,
                *config,
                *arguments,
                *options,
            ],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def vico(self, command: str, *arguments: str, code: int = 0, **environment: str) -> str:
        """Return the standard output of a command that must end with this exit code.

        Its standard error is in `errors`.
        """
        process = self.start(command, *arguments, **environment)
        output, self.errors = process.communicate(timeout=PATIENCE_S)
        self.last_output = output
        assert process.returncode == code, (process.returncode, output, self.errors)
        assert "Traceback" not in output + self.errors
        return output

    def pause(self, place: str, *arguments: str, **more: str) -> tuple[subprocess.Popen[str], Path]:
        """Start a run that waits in the middle of part STAGE:NUMBER; return it and the file that lets it
        continue."""
        mark = self.folder / f"paused-{len(self.started)}"
        process = self.start("run", *arguments, TINY_PAUSE=place, TINY_PAUSED=str(mark), **more)
        wait_until(mark.exists, process)
        return process, Path(f"{mark}.go")

    def status(self, run: str = "latest") -> dict[str, Any]:
        return json.loads(self.vico("status", run, "--json"))

    def runs(self) -> list[str]:
        return [run["run"] for run in json.loads(self.vico("status", "--json"))]

    def plan(self, *arguments: str) -> dict[str, tuple[str, list[str]]]:
        """Return stage -> (action, reasons)."""
        planned = json.loads(self.vico("plan", "--json", *arguments))
        return {stage["stage"]: (stage["action"], stage["reasons"]) for stage in planned}

    def stage(self, name: str) -> Path:
        """Return the only folder of the stage."""
        (folder,) = (self.storage / name).iterdir()
        return folder

    def record(self, name: str) -> dict[str, Any]:
        return json.loads((self.stage(name) / "record.json").read_text())

    def edit_record(self, name: str, **changes: Any) -> None:
        """Change the record and its digest, as if the stage had written it so."""
        content = {**self.record(name), **changes}
        content["record_digest"] = record_digest(content)
        (self.stage(name) / "record.json").write_text(json.dumps(content))

    def outputs(self) -> dict[str, bytes]:
        """Return the content of every published file below an output folder, by path."""
        return {
            str(path.relative_to(self.storage)): path.read_bytes()
            for path in sorted(self.storage.glob("*/*/output/**/*"))
            if path.is_file() and ".partial-" not in path.name
        }

    def kept(self) -> list[Path]:
        """Return every path of the storage except the cache of digests.

        The cache is written by the first command that reads a file some seconds after the file was written.
        """
        return sorted(path for path in self.storage.rglob("*") if path.name != "digests.json")

    def half_written(self) -> list[Path]:
        return list(self.storage.rglob("*.partial-*"))

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()
