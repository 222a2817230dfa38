"""What the benchmarks share: interleaved repetitions, medians with their spread, one JSON object last."""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

MACHINE_NOTE = "wall seconds; repetitions of all ways are interleaved, so a busy machine slows each alike"


def interleaved(
    ways: dict[str, Callable[[], int]], repetitions: int, unit: str = "samples"
) -> list[dict[str, Any]]:
    """A row for each way: units a second of every repetition, their median and spread.

    A way does its work and returns how many units that was. The order turns by one each time.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for repetition in range(repetitions):
        turned = names[repetition % len(names) :] + names[: repetition % len(names)]
        for name in turned:
            started = time.perf_counter()
            number = ways[name]()
            rates[name].append(number / (time.perf_counter() - started))
            print(f"{repetition + 1}/{repetitions} {name}: {rates[name][-1]:.0f} {unit}/s", flush=True)
    return [row(name, found, unit) for name, found in rates.items()]


def row(name: str, rates: list[float], unit: str = "samples") -> dict[str, Any]:
    middle = statistics.median(rates)
    return {
        "way": name,
        f"{unit}_per_s": round(middle, 1),
        "spread": round((max(rates) - min(rates)) / middle, 3),
        "repetitions": [round(rate, 1) for rate in rates],
    }


def ratio(rows: list[dict[str, Any]], ours: str, other: str) -> float:
    """The median of ours over other by repetition: neighbours in time share the load of the machine."""
    by_name = {one["way"]: one["repetitions"] for one in rows}
    pairs = zip(by_name[ours], by_name[other], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


def report(name: str, rows: list[dict[str, Any]], ratios: dict[str, float], as_json: bool) -> None:
    """A line for each row and ratio; with `as_json` the whole as one JSON object in the last line."""
    print(MACHINE_NOTE)
    for one in (one for one in rows if "spread" in one):
        rate, unit = next((value, key) for key, value in one.items() if key.endswith("_per_s"))
        print(f"{one['way']}: {rate} {unit.removesuffix('_per_s')}/s, spread {one['spread']:.0%}")
    for key, value in ratios.items():
        print(f"{key}: {value}")
    if as_json:
        print(json.dumps({"name": name, "rows": rows, "ratios": ratios}))
