"""Test questions that the routed model answers worse than the start model, from the evaluation's answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.graph import last_of
from pipeline.report.measured import evaluation
from pipeline.report.run_files import Missing, RunFiles
from pipeline.report.tables import Row, Table
from pipeline.results.quality import EVALUATED_STAGE
from stages.outputs import PREDICTIONS_FILE, SCORES_FILE

ROUTER_STAGE = "router"
NUM_SHOWN = 12
_TEXT_CHARS = 240
_COLUMNS = ("key", "kind", "model", "rates", "question", "answer", "prediction", "similarity")
Answer = Mapping[str, Any]
"""One row of the predictions."""


@dataclass(frozen=True)
class _Pair:
    """The answers of the start model and of the routed model to one question."""

    start: Answer
    routed: Answer

    @property
    def gain(self) -> float:
        """How much more similar the routed answer is to the expected one; negative if it is less so."""
        return float(self.routed["similarity"] - self.start["similarity"])


def changed_answers(files: RunFiles) -> Table:
    """Return the questions whose answer at the calibrated threshold lost most against the start model, with
    counts of all questions.

    Raises Missing.
    """
    threshold = evaluation(files)["absolute_threshold"]
    path = files.path(EVALUATED_STAGE, PREDICTIONS_FILE)
    rates_by_key = _routed_rates(files, threshold)
    pairs, num_unknown = _pairs(pq.read_table(path, columns=list(_COLUMNS)), rates_by_key)
    if not pairs:
        raise Missing("The answers of the evaluation do not name the tiles that the router compresses.")
    worse = sorted((pair for pair in pairs if pair.gain < 0), key=lambda pair: pair.gain)
    num_better = sum(pair.gain > 0 for pair in pairs)
    counts = (
        f"Of {len(pairs):,} test questions the routed model answers {len(worse):,} worse than the start "
        f"model, {num_better:,} better, and {len(pairs) - len(worse) - num_better:,} as well."
    )
    notes = [counts]
    if num_unknown:
        notes.append(
            f"{num_unknown:,} questions are left out: their answer or the scores of their tiles are gone."
        )
    shown = worse[:NUM_SHOWN]
    caption = "Questions whose answer lost most against the start model"
    columns = ("sample", "kind", "question", "expected", "start model", "routed", "tiles compressed")
    return Table(caption, columns, [_row(pair) for pair in shown], num_numbers=1, notes=notes)


def _routed_rates(files: RunFiles, threshold: float) -> dict[str, str]:
    """Return key -> rates of its tiles in prompt order, `1` compressed, as the predictions name them."""
    columns = ["key", "image", "tile", "p_compress"]
    router = last_of(files.run.stages, ROUTER_STAGE)
    tables = [pq.read_table(files.path(router, SCORES_FILE), columns=[*columns, "split"])]
    tables[0] = tables[0].filter(pc.equal(tables[0]["split"], "test")).select(columns)
    if SCORES_FILE in files.record(EVALUATED_STAGE).outputs:
        tables.append(pq.read_table(files.path(EVALUATED_STAGE, SCORES_FILE), columns=columns))
    tiles: dict[str, dict[tuple[int, int], str]] = {}
    for table in tables:
        # as stored: the rule compares in float32
        compressed = table["p_compress"].to_numpy() >= np.float32(threshold)
        places = zip(*(table[name].to_pylist() for name in columns[:3]), strict=True)
        for (key, image, tile), is_compressed in zip(places, compressed, strict=True):
            tiles.setdefault(key, {})[image, tile] = "1" if is_compressed else "0"
    return {key: "".join(rates[place] for place in sorted(rates)) for key, rates in tiles.items()}


def _pairs(predictions: Any, rates_by_key: Mapping[str, str]) -> tuple[list[_Pair], int]:
    """Return the pairs of answers, and the number of questions without one."""
    start: dict[str, Answer] = {}
    routed: dict[str, Answer] = {}
    for batch in predictions.to_batches():
        for answer in batch.to_pylist():
            key = answer["key"]
            if answer["model"] == "reference":
                start[key] = answer
            elif answer["rates"] == rates_by_key.get(key, ""):
                routed[key] = answer
    return [_Pair(start[key], routed[key]) for key in start if key in routed], len(
        start.keys() - routed.keys()
    )


def _row(pair: _Pair) -> Row:
    routed = pair.routed
    num_compressed = f"{routed['rates'].count('1')} of {len(routed['rates'])}"
    texts: Sequence[str] = (
        routed["key"],
        routed["kind"],
        routed["question"],
        routed["answer"],
        pair.start["prediction"],
        routed["prediction"],
    )
    return Row((*map(_cut, texts), num_compressed))


def _cut(text: str | None) -> str:
    """Return a text, cut with the number of characters that are left out."""
    text = text or ""
    if len(text) <= _TEXT_CHARS:
        return text
    return f"{text[:_TEXT_CHARS]} … ({len(text) - _TEXT_CHARS:,} more characters)"
