"""The parts of `benchmarks/device.sh`, one after another, each in processes of its own with a time limit.

    python -m benchmarks.device --out results [--dry-run] [--parts NAME,NAME]

`device.json` in the folder has, for each part, `ok`, `seconds`, its `results`, and for a part that failed or
was stopped `error`. It is written after every part. Every part has a share of the time, which the parts
before it cannot use up; what those leave, it can use too. The last output is a summary
(`benchmarks/device_summary.py`).
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

from benchmarks.device_runner import END_S, PartFailed, Runner
from benchmarks.device_summary import summary

_PYTHON = sys.executable
_VICO = (_PYTHON, "-c", "from vico_command import main; main()")
_H100_H200_TFLOPS = 989.4  # bfloat16, dense, by the data sheet
_DRY_RUN_S = 3600.0
_LAST_S = 10.0
"""How long before the end of a part its last setting may start."""
_SMALL_QUICKSTART = (
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
_BFLOAT16 = ("consistency.optimizer.dtype=bfloat16", "router.optimizer.dtype=bfloat16")
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


@dataclass(frozen=True)
class Part:
    """A part of the measurement, and the seconds that it has in any case of the 520 of a whole run."""

    run: Callable[[Runner], Any]
    share_s: float


def environment(runner: Runner) -> Any:
    """Return device, versions and missing packages."""
    facts = runner.json_output((_PYTHON, "-m", "benchmarks.device_environment"))
    if not runner.dry_run and facts["device"] is None:
        raise PartFailed(f"torch {facts['packages'].get('torch')} sees no CUDA device", facts)
    return facts


def rows_of(runner: Runner, command: Sequence[str], is_needed: Callable[[Mapping[str, Any]], bool]) -> Any:
    """Return the rows that a command measures.

    Raises PartFailed if a row that is needed was skipped, or every row.
    """
    rows = runner.rows(command)
    skipped = [row for row in rows if "skipped" in row]
    if failed := [row["skipped"] for row in skipped if is_needed(row)]:
        raise PartFailed(failed[0], {"rows": rows})
    if len(skipped) == len(rows):
        raise PartFailed("no setting could be measured", {"rows": rows})
    return {"rows": rows}


def steps(group: str, *, may_skip: bool) -> Callable[[Runner], Any]:
    """Return the part that measures a group of `benchmarks/device_steps.py`."""

    def part(runner: Runner) -> Any:
        command = [_PYTHON, "-m", "benchmarks.device_steps", "--group", group, "--device", runner.device]
        command += ["--ends-s", str(runner.part_ends_s - _LAST_S)]
        if runner.dry_run:
            command += ["--repeats", "1", "--backend", "eager"]
        else:
            command += ["--peak-tflops", str(_H100_H200_TFLOPS)]
        return rows_of(runner, command, lambda row: not may_skip)

    return part


def tests(runner: Runner) -> Any:
    """Return the counts and failures of the tests that need a CUDA device; without one they are skipped."""
    report = runner.scratch / "tests.xml"
    command = (_PYTHON, "-m", "pytest", "-q", "-m", "cuda", "tests/numerics/test_cuda.py")
    error = ""
    try:
        runner.output((*command, "-p", "no:cacheprovider", f"--junitxml={report}"))
    except RuntimeError as failed:
        error = str(failed)
    if not report.exists():
        raise PartFailed(error, {})
    suite = next(ElementTree.parse(report).iter("testsuite"))
    results: dict[str, Any] = {
        name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    }
    results["failing"] = [
        case.get("name")
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    if error:
        raise PartFailed(error, results)
    if not runner.dry_run and results["skipped"]:
        raise PartFailed(f"{results['skipped']} tests were skipped", results)
    return results


def attention(runner: Runner) -> Any:
    """Return the rows of `benchmarks/attention.py`. Kernels that are not installed are skipped."""
    command = [_PYTHON, "-m", "benchmarks.attention", "--json", "--device", runner.device]
    command += ["--repeats", "1"] if runner.dry_run else []
    return rows_of(runner, command, lambda row: False)


def loss(runner: Runner) -> Any:
    """Return the rows of `benchmarks/kl.py`: ours beside dense and, where installed, liger and TRL."""
    command = [_PYTHON, "-m", "benchmarks.kl", "--json", "--device", runner.device, "--repeats", "1"]
    if runner.dry_run:
        command += ["--tokens", "16", "--cases", "ours,ours-1024,dense,liger-kl"]
    else:
        command += ["--dtype", "bfloat16", "--tokens", "4096"]
        command += ["--budget-s", f"{max(runner.seconds_left() - 2 * _LAST_S, 0):.0f}"]
        command += ["--cases", "ours,ours-1024,dense,liger-kl,trl,liger,liger-jsd"]
    own = ("ours", "ours-1024", "dense")
    return rows_of(runner, command, lambda row: row["case"] in own)


def quickstart(*, whole: bool) -> Callable[[Runner], Any]:
    """Return the part that runs configs/quickstart.yaml to its end and audits it.

    `whole` runs it at its own sizes, otherwise it is small; on CUDA it trains in bfloat16.
    """

    def part(runner: Runner) -> Any:
        site, storage = runner.scratch / "site.yaml", runner.scratch / "runs"
        cpus = 2 if runner.dry_run else max(2, min(os.cpu_count() or 2, 8))
        site.write_text(_SITE.format(cpus=cpus, tasks=max(cpus - 1, 1), gpus=int(not runner.dry_run)))
        where = ("--site", str(site), "--storage", str(storage))
        changes = (*(() if whole else _SMALL_QUICKSTART), *(() if runner.dry_run else _BFLOAT16))
        words = tuple(word for change in changes for word in ("--set", change))
        results: dict[str, Any] = {"changes": changes}
        error = ""
        try:
            command = (*_VICO, "run", "configs/quickstart.yaml", *where, *words, "--json")
            results["run"] = runner.json_output(command, reserve_s=25)
            results["audit"] = runner.json_output((*_VICO, "audit", "latest", *where, "--json"), reserve_s=8)
        except (RuntimeError, ValueError) as failed:
            error = str(failed)
        results["stages"] = _stages(runner, where)
        if error:
            raise PartFailed(error, results)
        return results

    return part


def _stages(runner: Runner, where: tuple[str, ...]) -> Any:
    """Return name, state and seconds of the run's stages, as far as it came."""
    try:
        shown = runner.json_output((*_VICO, "status", "latest", *where, "--json"))
    except (RuntimeError, ValueError) as error:
        return [{"name": "unknown", "state": f"vico status: {error}", "seconds": None}]
    return [{name: stage[name] for name in ("name", "state", "seconds")} for stage in shown["stages"]]


PARTS: Mapping[str, Part] = {
    "environment": Part(environment, 20),
    "compiled": Part(steps("compiled", may_skip=False), 90),
    "deepspeed": Part(steps("deepspeed", may_skip=False), 70),
    "quickstart": Part(quickstart(whole=False), 165),
    "tests": Part(tests, 55),
    "loss": Part(loss, 40),
    "attention": Part(attention, 20),
    "attention_steps": Part(steps("attention", may_skip=True), 35),
    "plain": Part(steps("plain", may_skip=True), 25),
}
"""The parts in their order: those whose results matter most come first."""
OTHER_PARTS: Mapping[str, Part] = {"whole_quickstart": Part(quickstart(whole=True), 520)}
"""Parts that need the time of all others; only `--parts` starts them."""


def part_end_s(ends_s: float, names: Sequence[str], number: int) -> float:
    """Return when part `number` of `names` must end, by the monotonic clock, if all must end at `ends_s`.

    Parts after it keep their shares. If less time is left than all shares, every share shrinks alike.
    """
    all_parts = PARTS | OTHER_PARTS
    own, *later = (all_parts[name].share_s for name in names[number:])
    left = max(ends_s - time.monotonic(), 0.0)
    return ends_s - sum(later) * min(1.0, left / (own + sum(later)))


def record(runner: Runner, part: Callable[[Runner], Any]) -> dict[str, Any]:
    """Run a part; return its results, or why it failed and the results before that."""
    started = time.monotonic()
    try:
        entry = {"ok": True, "results": part(runner)}
    except PartFailed as failed:
        entry = {"ok": False, "error": str(failed), "results": failed.results}
    except Exception as failed:  # whatever it is, the other parts go on
        kind = "" if type(failed) is RuntimeError else f"{type(failed).__name__}: "
        entry = {"ok": False, "error": f"{kind}{failed}"}
    return {**entry, "seconds": round(time.monotonic() - started, 1)}


class Stopped(BaseException):
    """This program got SIGTERM or SIGINT."""


def _raise_stopped(number: int, _: object) -> NoReturn:
    for name in (signal.SIGTERM, signal.SIGINT):  # once: ending the commands takes a while
        signal.signal(name, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


def measure(names: Sequence[str], out: Path, ends_s: float, report: dict[str, Any]) -> None:
    """Run the parts one after another, and write the report after each of them."""
    entries, all_parts = report["parts"], PARTS | OTHER_PARTS
    entries |= {name: {"ok": False, "error": "not started", "seconds": 0.0} for name in names}
    with tempfile.TemporaryDirectory(prefix="vico-", ignore_cleanup_errors=True) as scratch:
        runner = Runner(out, report["dry_run"], Path(scratch), ends_s)
        for number, name in enumerate(names):
            runner.part, runner.part_ends_s = name, part_end_s(ends_s, names, number)
            entries[name] = {"ok": False, "error": "started and not ended", "seconds": 0.0}
            entries[name] = entry = record(runner, all_parts[name].run)
            report["ok"] = all(part["ok"] for part in entries.values())
            _write(out / "device.json", report)
            runner.rows_file.unlink(missing_ok=True)
            print(f"{name}: {'ok' if entry['ok'] else entry['error']} ({entry['seconds']} s)", flush=True)


def _write(path: Path, report: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for device.json and log.txt")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, in at most an hour")
    parser.add_argument("--limit-s", type=float, default=540, help="seconds for all parts")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated names")
    options = parser.parse_args()
    names = list(dict.fromkeys(options.parts.split(",")))
    known = [*PARTS, *OTHER_PARTS]
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"--parts {unknown[0]} is none of {', '.join(known)}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_stopped)
    options.out.mkdir(parents=True, exist_ok=True)
    ends_s = time.monotonic() + (_DRY_RUN_S if options.dry_run else options.limit_s - END_S)
    report: dict[str, Any] = {"name": "device", "dry_run": options.dry_run, "ok": False, "parts": {}}
    try:
        measure(names, options.out, ends_s, report)
    except Stopped as stopped:
        report |= {"ok": False, "error": f"stopped by {stopped}"}
        _write(options.out / "device.json", report)
    print(summary(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
