"""The result of a check of a site, and its way through the log of a job."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "failed", "skipped"]
MARK = "vico-site-check: "
"""Begins the line of a job's log that has the results as JSON."""


@dataclass(frozen=True)
class CheckResult:
    """What one check saw: `detail` is a fact, `remedy` what the user can do about a failure."""

    check: str
    state: State
    detail: str
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def passed(check: str, detail: str) -> CheckResult:
    return CheckResult(check, "ok", detail)


def failed(check: str, detail: str, remedy: str) -> CheckResult:
    return CheckResult(check, "failed", detail, remedy)


def skipped(check: str, detail: str) -> CheckResult:
    return CheckResult(check, "skipped", detail)


def log_line(results: list[CheckResult]) -> str:
    """Return the line that `results_in_log` finds."""
    return MARK + json.dumps([result.as_json() for result in results])


def results_in_log(log: str) -> list[CheckResult] | None:
    """Return the results in the log of a job, None if it has none (yet)."""
    lines = [line.partition(MARK)[2] for line in log.splitlines() if MARK in line]
    return [CheckResult(**result) for result in json.loads(lines[-1])] if lines else None
