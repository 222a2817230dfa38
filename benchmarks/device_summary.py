"""The results of `benchmarks/device.sh` on one screen.

python -m benchmarks.device_summary results/device.json
"""

import json
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_WIDTH = 110
Row = Mapping[str, Any]


def summary(report: Row) -> str:
    """Return one line per part, and one per setting that a part measured."""
    kind = "dry run on a CPU" if report["dry_run"] else "on a CUDA device"
    state = "every part ended well" if report["ok"] else report.get("error", "not every part ended well")
    lines = [f"device measurement, {kind}: {state}"]
    for name, part in report["parts"].items():
        state = "ok" if part["ok"] else f"FAILED: {part['error']}"
        lines.append(f"{name:<17}{part['seconds']:>6.0f} s  {state}")
        lines += [f"    {line}" for line in _LINES.get(name, _steps)(part.get("results") or {})]
    return "\n".join(_wrapped(line) for line in lines)


def _wrapped(line: str) -> str:
    """Return the line, continued below if it is long."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(line, _WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _steps(results: Row) -> list[str]:
    """Return one line per setting of the consistency step."""
    return [f"{_setting(row)}: {_step(row)}" for row in results.get("rows", [])]


def _setting(row: Row) -> str:
    words = [f"{row['tiles']} tiles" if "tiles" in row else f"{row['samples']} samples"]
    words.append(f"checkpointing {row['checkpointing']}")
    words += ["compiled"] if row["compiled"] else []
    words += [f"ZeRO-{row['zero_stage']}"] if row["zero_stage"] else []
    words += [f"{name} by {row[name]}" for name in ("rows", "vision") if row[name] != "auto"]
    return ", ".join(words)


def _step(row: Row) -> str:
    if "skipped" in row:
        return f"not measured: {row['skipped']}"
    words = [f"{row['seconds'] * 1e3:,.0f} ms", f"{row['tokens_per_second']:,.0f} tokens/s"]
    words += [f"MFU {row['mfu']:.1%}"] if "mfu" in row else []
    words += [f"peak {row['peak_memory_gb']:.1f} GB"] if "peak_memory_gb" in row else []
    words += [f"computed {row['computed_memory_gb']:.1f} GB"] if "computed_memory_gb" in row else []
    return ", ".join(words)


def _environment(results: Row) -> list[str]:
    if not results:
        return []
    packages = [f"{name} {version}" for name, version in results["packages"].items()]
    where = results["device"] or "no CUDA device"
    missing = [f"missing: {', '.join(results['missing'])}"] if results["missing"] else []
    return [", ".join([f"{where}, Python {results['python']}", *packages]), *missing]


def _quickstart(results: Row) -> list[str]:
    if not results:
        return []
    stages = [
        f"{stage['name']} {stage['state']}" + (f" {stage['seconds']:.0f} s" if stage["seconds"] else "")
        for stage in results.get("stages", [])
    ]
    audit = results.get("audit")
    word = "not run" if audit is None else "clean" if audit["ok"] else "has findings"
    return [", ".join(stages), f"audit: {word}"]


def _tests(results: Row) -> list[str]:
    if not results:
        return []
    counts = ", ".join(f"{results[name]} {name}" for name in ("tests", "failures", "errors", "skipped"))
    return [counts, *results["failing"]]


def _loss(results: Row) -> list[str]:
    """Return one line per case of the loss."""
    return [
        f"{row['case']}, {row['answer_tokens']} tokens: "
        + (
            f"not measured: {row['skipped']}"
            if "skipped" in row
            else f"{row['seconds'] * 1e3:,.1f} ms, {row['memory_gb']:.2f} GB, "
            f"error {row['hidden_grad_error']:.1e}"
        )
        for row in results.get("rows", [])
    ]


def _attention(results: Row) -> list[str]:
    """Return one line per shape, with all kernels."""
    by_part: dict[str, list[str]] = {}
    for row in results.get("rows", []):
        word = "not run" if "skipped" in row else f"{row['ms']:.2f} ms"
        by_part.setdefault(row["part"], []).append(f"{row['kernel']} {word}")
    return [f"{part}: {', '.join(kernels)}" for part, kernels in by_part.items()]


_LINES: Mapping[str, Callable[[Row], list[str]]] = {
    "environment": _environment,
    "quickstart": _quickstart,
    "whole_quickstart": _quickstart,
    "tests": _tests,
    "loss": _loss,
    "attention": _attention,
}


if __name__ == "__main__":
    print(summary(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
