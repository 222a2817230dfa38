"""The results of the drill's rounds: kept in a file of JSON lines, and shown as a table."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

NUM_STEPS = 36
CHECKPOINT_EVERY = 4
_ROUNDS_FILE = "rounds.jsonl"


@dataclass
class Round:
    """What happened in a round, and its result."""

    number: int
    kind: str
    kill_after_step: int
    killed_at_step: int = 0
    commands: int = 1
    restarts: float = 0
    preemptions: float = 0
    weights: str = ""
    largest_difference: float = 0.0
    steps_once: bool = False
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def earlier_rounds(folder: Path) -> list[Round]:
    """Return the rounds of earlier calls with this folder."""
    path = folder / _ROUNDS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [Round(**json.loads(line)) for line in lines]


def keep_round(folder: Path, result: Round) -> str:
    """Append a round to the file in `folder`; return the line."""
    line = json.dumps(asdict(result)) + "\n"
    with (folder / _ROUNDS_FILE).open("a") as file:
        file.write(line)
    return line


def json_report(rounds: list[Round]) -> str:
    """Return all rounds as one line of JSON, in the form of the benchmarks."""
    return json.dumps({"name": "drill", "rows": [asdict(result) for result in rounds], "ratios": {}}) + "\n"


def report(rounds: list[Round]) -> str:
    """Return all rounds as a page of Markdown."""
    good = [result for result in rounds if not result.problems]
    minutes = sum(result.seconds for result in rounds) / 60
    lines = [
        f"# Drill: {len(good)} of {len(rounds)} rounds ended as the undisturbed training\n",
        f"{NUM_STEPS} steps, a checkpoint every {CHECKPOINT_EVERY}, 2 ranks on a 3-node Ray cluster on one "
        f"host, ZeRO-2, float32; {minutes:.0f} minutes of rounds.\n",
        "| round | what | at step | commands | failures | preemptions | weights | steps once in MLflow | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in rounds:
        lines.append(
            f"| {result.number} | {result.kind} | {result.killed_at_step} | {result.commands} | "
            f"{result.restarts:.0f} | {result.preemptions:.0f} | {result.weights} | "
            f"{'yes' if result.steps_once else 'no'} | {result.seconds:.0f} |"
        )
    lines += [f"\nround {result.number}: {problem}" for result in rounds for problem in result.problems]
    return "\n".join(lines) + "\n"
