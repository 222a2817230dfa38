"""The parts of `benchmarks/device.sh`, one after another, each in processes of its own with a time limit.

    python -m benchmarks.device --out results [--dry-run] [--parts NAME,NAME]

`device.json` in the folder has, for each part, `ok`, `seconds`, its `results`, and for a part that failed or
was stopped `error`. It is written after every part.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
_END_S = 20.0
"""How long a stopped part may take to end its own processes."""
_DRY_RUN_FACTOR = 10.0
"""A CPU that others use, too, may take this much longer."""
_VICO = (sys.executable, "-c", "from vico_command import main; main()")
_H100_H200_TFLOPS = 989.4  # bfloat16, dense, by the data sheet
_QUICKSTART_AT_TINY_SIZE = (
    "inputs.records.num_samples=160",
    "shard.samples_per_shard=40",
    "consistency.max_steps=2",
    "router.epochs=1",
    "ratio.max_samples=12",
    "evaluate.max_samples=6",
    "evaluate.num_replicates=2",
    "evaluate.num_resamples=100",
    "evaluate.shares=[0.5]",
    "evaluate.controls=[random]",
)
_SITE = """\
name: device
ray: {{num_cpus: {cpus}, start_timeout_s: 600}}
resources:
  workers: 1
  actors: 1
  tasks: {tasks}
  gpus_per_worker: {gpus}
  stages: {{shard: {{gpus_per_worker: 0}}}}
"""


@dataclass
class Runner:
    """Runs the commands of parts, with their output in `log.txt`, until the time is used up."""

    out: Path
    dry_run: bool
    ends_s: float
    """When all parts must have ended, by the monotonic clock."""
    scratch: Path
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.out / "log.txt"

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def output(self, command: tuple[str, ...], limit_s: float) -> str:
        """Run a command and return its standard output; raise RuntimeError if it fails or is stopped."""
        if self.dry_run:
            limit_s *= _DRY_RUN_FACTOR
        limit_s = min(limit_s, self.ends_s - time.monotonic())
        if limit_s <= 0:
            raise RuntimeError("no time left")
        environment = {
            "TORCH_EXTENSIONS_DIR": str(self.scratch / "extensions"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),
            **os.environ,
            "DS_ACCELERATOR": self.device,
        }
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
            try:
                output, _ = process.communicate(timeout=limit_s)
            except subprocess.TimeoutExpired:
                log.write(_stopped(process))
                raise RuntimeError(f"stopped after {limit_s:.0f} s") from None
            finally:
                if process.poll() is None:  # this program was stopped
                    _stopped(process)
            log.write(output)
        if process.returncode:
            raise RuntimeError(f"ended with {process.returncode}: {_last_error(self.log)}")
        return output

    def json_output(self, command: tuple[str, ...], limit_s: float) -> Any:
        """Return the JSON in the last line that a command prints; raise RuntimeError as `output` does."""
        lines = self.output(command, limit_s).strip().splitlines()
        if not lines:
            raise RuntimeError("printed nothing")
        return json.loads(lines[-1])


def _stopped(process: subprocess.Popen[str]) -> str:
    """Ask a process to end, then end its whole group; return its output."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        output, _ = process.communicate(timeout=_END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return output


def _last_error(path: Path) -> str:
    """Return the last line of the last command that names an error, or its last line."""
    text = path.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines)[-1][:300]


def environment(runner: Runner) -> Any:
    """Return device, driver and package versions."""
    code = (
        "import json, platform, importlib.metadata as m, torch\n"
        "names = ('torch', 'transformers', 'deepspeed', 'ray', 'triton', 'flash-attn', 'flash-attn-4',"
        " 'liger-kernel', 'trl')\n"
        "versions = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "cuda = torch.cuda.is_available()\n"
        "print(json.dumps({'python': platform.python_version(), 'cuda': torch.version.cuda,"
        " 'device': torch.cuda.get_device_name() if cuda else None,"
        " 'memory_gb': torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else None,"
        " 'packages': {n: versions[n] for n in names if n in versions}}))"
    )
    facts = runner.json_output((sys.executable, "-c", code), 60)
    if not runner.dry_run and facts["device"] is None:
        raise RuntimeError(f"torch {facts['packages'].get('torch')} sees no CUDA device")
    return facts


def steps(group: str, limit_s: float) -> Callable[[Runner], Any]:
    """Return the part that measures a group of `benchmarks/device_steps.py`."""

    def part(runner: Runner) -> Any:
        rows = runner.scratch / f"{group}.jsonl"
        command = [sys.executable, "-m", "benchmarks.device_steps", "--group", group, "--out", str(rows)]
        command += ["--device", runner.device]
        if runner.dry_run:
            command += ["--samples", "1", "--repeats", "1", "--backend", "eager"]
        else:
            command += ["--peak-tflops", str(_H100_H200_TFLOPS)]
        error = ""
        try:
            runner.output(tuple(command), limit_s)
        except RuntimeError as failed:
            error = str(failed)
        measured = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        if error or not any("seconds" in row for row in measured):
            raise PartFailed(error or "no setting could be measured", {"rows": measured})
        return {"rows": measured}

    return part


def tests(runner: Runner) -> Any:
    """Return the counts and failures of the tests that need a CUDA device; without one they are skipped."""
    report = runner.scratch / "tests.xml"
    command = (sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/numerics/test_cuda.py")
    error = ""
    try:
        runner.output((*command, "-p", "no:cacheprovider", f"--junitxml={report}"), 120)
    except RuntimeError as failed:
        error = str(failed)
    if not report.exists():
        raise PartFailed(error, {})
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failing = [
        case.get("name")
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    if error:
        raise PartFailed(error, {**counts, "failing": failing})
    return {**counts, "failing": failing}


def attention(runner: Runner) -> Any:
    """Return the rows of `benchmarks/attention.py`."""
    repeats = ("--repeats", "1") if runner.dry_run else ()
    command = (sys.executable, "-m", "benchmarks.attention", "--json", "--device", runner.device, *repeats)
    return runner.json_output(command, 60)


def loss(runner: Runner) -> Any:
    """Return the rows of `benchmarks/kl.py`: ours beside dense and, where installed, liger and TRL."""
    command = [sys.executable, "-m", "benchmarks.kl", "--json", "--device", runner.device, "--repeats", "1"]
    if runner.dry_run:
        command += ["--tokens", "16", "--cases", "ours,ours-1024,dense,liger-kl"]
    else:
        command += ["--dtype", "bfloat16", "--tokens", "4096", "--budget-s", "70"]
        command += ["--cases", "ours,ours-1024,dense,liger-kl,trl,liger,liger-jsd"]
    return runner.json_output(tuple(command), 100)


def quickstart(runner: Runner) -> Any:
    """Return the end of a whole `vico run configs/quickstart.yaml`, its stages and its audit."""
    site, storage = runner.scratch / "site.yaml", runner.scratch / "runs"
    cpus = 2 if runner.dry_run else max(2, min(os.cpu_count() or 2, 8))
    site.write_text(_SITE.format(cpus=cpus, tasks=max(cpus - 1, 1), gpus=int(not runner.dry_run)))
    where = ("--site", str(site), "--storage", str(storage))
    sizes = _QUICKSTART_AT_TINY_SIZE if runner.dry_run else ()
    changes = tuple(word for change in sizes for word in ("--set", change))
    results: dict[str, Any] = {}
    try:
        command = (*_VICO, "run", "configs/quickstart.yaml", *where, *changes, "--json")
        results["run"] = runner.json_output(command, 240)
        results["audit"] = runner.json_output((*_VICO, "audit", "latest", *where, "--json"), 60)
    except RuntimeError as failed:
        raise PartFailed(str(failed), results | {"stages": _stages(runner, where)}) from failed
    return results | {"stages": _stages(runner, where)}


def _stages(runner: Runner, where: tuple[str, ...]) -> Any:
    """Return name, state and seconds of the run's stages, as far as it came."""
    try:
        shown = runner.json_output((*_VICO, "status", "latest", *where, "--json"), 30)
    except (RuntimeError, ValueError):
        return []
    return [{name: stage[name] for name in ("name", "state", "seconds")} for stage in shown["stages"]]


class PartFailed(RuntimeError):
    """A part that failed after it had some results."""

    def __init__(self, message: str, results: Any):
        super().__init__(message)
        self.results = results


PARTS: Mapping[str, Callable[[Runner], Any]] = {
    "environment": environment,
    "compiled": steps("compiled", 100),
    "deepspeed": steps("deepspeed", 100),
    "quickstart": quickstart,
    "tests": tests,
    "loss": loss,
    "attention": attention,
    "attention_steps": steps("attention", 80),
    "plain": steps("plain", 80),
}
"""The parts in their order: those whose results matter most come first, in case the time runs out."""


def record(runner: Runner, part: Callable[[Runner], Any]) -> dict[str, Any]:
    """Run a part; return its results, or why it failed and the results before that."""
    started = time.monotonic()
    try:
        entry = {"ok": True, "results": part(runner)}
    except PartFailed as failed:
        entry = {"ok": False, "error": str(failed), "results": failed.results}
    except (RuntimeError, ValueError, KeyError, OSError) as failed:
        entry = {"ok": False, "error": f"{failed}" or type(failed).__name__}
    return {**entry, "seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for device.json and log.txt")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, without a time limit")
    parser.add_argument("--limit-s", type=float, default=540, help="seconds for all parts")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated names")
    options = parser.parse_args()
    names = options.parts.split(",")
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        parser.error(f"--parts {unknown[0]} is none of {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a running part is stopped, too
    options.out.mkdir(parents=True, exist_ok=True)
    limit_s = 3600.0 if options.dry_run else options.limit_s - _END_S
    report: dict[str, Any] = {"name": "device", "dry_run": options.dry_run, "ok": False, "parts": {}}
    with tempfile.TemporaryDirectory(prefix="vico-", ignore_cleanup_errors=True) as scratch:
        runner = Runner(options.out, options.dry_run, time.monotonic() + limit_s, Path(scratch))
        for name in names:
            report["parts"][name] = entry = record(runner, PARTS[name])
            ended = report["parts"]
            report["ok"] = len(ended) == len(set(names)) and all(part["ok"] for part in ended.values())
            (options.out / "device.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: {'ok' if entry['ok'] else entry['error']} ({entry['seconds']} s)", flush=True)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
