"""Compare two result folders of lmms-eval, question by question: a table with intervals.

    python examples/evaluation_kits/compare.py results/full results/routed

Both runs need `--log_samples`. For every task and metric that both have, a row gives the means of both
runs, the difference of the second to the first and its 95 % interval: the questions are drawn again with
replacement 10,000 times, in pairs, since both runs answered the same ones. Questions that only one run has
are counted.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

_DRAWS = 10_000
_CHUNK = 256
_NAME = re.compile(r"samples_(.+)\.jsonl$")
_NOT_METRICS = frozenset(("doc_id", "idx", "schema_hash", "doc_hash", "prompt_hash", "target_hash"))

Scores = dict[tuple[str, str], dict[str, float]]
"""(task, metric) -> score by question."""


def scores_of(folder: Path) -> Scores:
    """Return the scores in a folder; of several runs of a task, the newest.

    Raises SystemExit if the folder has no samples.
    """
    newest: dict[str, Path] = {}
    for path in sorted(folder.rglob("*samples_*.jsonl"), key=lambda path: path.stat().st_mtime):
        named = _NAME.search(path.name)
        if named:
            newest[named[1]] = path
    if not newest:
        raise SystemExit(f"{folder} has no *_samples_TASK.jsonl; run lmms-eval with --log_samples")
    scores: Scores = defaultdict(dict)
    for task, path in newest.items():
        with path.open(encoding="utf-8") as lines:
            for sample in map(json.loads, lines):
                for metric, value in sample.items():
                    if metric not in _NOT_METRICS and (score := number(value)) is not None:
                        scores[task, metric][str(sample["doc_id"])] = score
    return scores


def number(value: Any) -> float | None:
    """Return the score in a field of a sample: a number, or one inside the object that a task logs."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, dict):
        inner = value.get("score", value.get("scores"))
        return None if isinstance(inner, dict) else number(inner)
    if isinstance(value, list) and len(value) == 1:
        return number(value[0])
    return None


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean, by the percentiles of the bootstrap."""
    random = np.random.default_rng(0)
    means = np.concatenate(
        [
            differences[random.integers(0, len(differences), (_CHUNK, len(differences)))].mean(axis=1)
            for _ in range(-(-_DRAWS // _CHUNK))
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def table(first: Scores, second: Scores) -> str:
    """Return the comparison in Markdown, and below it what only one of both has."""
    heads = ("task", "metric", "questions", "first", "second", "difference", "95 % interval")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    notes = []
    for task, metric in sorted(first.keys() | second.keys()):
        ours, theirs = first.get((task, metric), {}), second.get((task, metric), {})
        common = sorted(ours.keys() & theirs.keys())
        if len(common) < max(len(ours), len(theirs)):
            notes.append(f"{task} {metric}: {len(ours)} and {len(theirs)} questions, {len(common)} in both")
        if not common:
            continue
        pairs = np.array([[ours[key], theirs[key]] for key in common])
        means = pairs.mean(axis=0)
        low, high = interval(pairs[:, 1] - pairs[:, 0])
        values = f"{means[0]:.4f} | {means[1]:.4f} | {means[1] - means[0]:+.4f} | {low:+.4f} to {high:+.4f}"
        lines.append(f"| {task} | {metric} | {len(common)} | {values} |")
    return "\n".join([*lines, "", *notes]) if notes else "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("first", type=Path, help="for example the run at the full rate")
    parser.add_argument("second", type=Path, help="for example the routed run")
    arguments = parser.parse_args()
    print(table(scores_of(arguments.first), scores_of(arguments.second)))


if __name__ == "__main__":
    main()
