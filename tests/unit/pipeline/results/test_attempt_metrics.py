"""Metrics of all attempts: read as they are written, in order, each line until it was taken."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.metric_lines import MetricLine
from pipeline.results.attempt_metrics import GrowingMetrics, first_values, metrics_of_attempts


def text(step: int, **metrics: float) -> str:
    return MetricLine(step, 100.0 + step, metrics).text()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "attempts"


@pytest.fixture
def append(folder) -> Callable[..., None]:
    def append_to_file(attempt: int, content: str, name: str = "metrics.jsonl") -> None:
        (folder / str(attempt)).mkdir(parents=True, exist_ok=True)
        with (folder / str(attempt) / name).open("a") as file:
            file.write(content)

    return append_to_file


def taken(files: GrowingMetrics, num_values: int = 1000) -> list[tuple[int, dict[str, float]]]:
    """Take the next lines; return (step, metrics) of those that are not damaged."""
    lines = files.unread(num_values)
    files.take(lines)
    return [(line.content.step, dict(line.content.metrics)) for line in lines if line.content is not None]


def test_half_a_line_waits_until_it_is_whole(folder, append):
    files = GrowingMetrics(folder)
    assert taken(files) == []
    second = text(2, loss=0.5)
    append(1, text(1, loss=1.0) + second[:20])
    assert taken(files) == [(1, {"loss": 1.0})]
    assert taken(files) == []
    append(1, second[20:])
    assert taken(files) == [(2, {"loss": 0.5})]


def test_half_a_line_of_a_killed_attempt_is_never_read(folder, append):
    append(1, text(1, loss=1.0) + text(2, loss=0.5)[:20])
    append(2, text(2, loss=0.6))
    assert taken(GrowingMetrics(folder)) == [(1, {"loss": 1.0}), (2, {"loss": 0.6})]


def test_attempts_come_in_order_of_their_numbers_with_all_their_files(folder, append):
    append(10, text(3, loss=0.1))
    append(9, text(2, loss=0.2))
    append(9, text(0, cpu=50.0), "system-node.jsonl")
    assert [step for step, _ in taken(GrowingMetrics(folder))] == [2, 0, 3]
    assert [line.step for line in metrics_of_attempts(folder)] == [2, 0, 3]


def test_lines_that_were_not_taken_come_again(folder, append):
    """What is read while the server is down must not be lost."""
    files = GrowingMetrics(folder)
    append(1, "".join(text(step, a=0.0, b=0.0) for step in range(10)))
    first = files.unread(4)
    assert [line.content.step for line in first if line.content] == [0, 1]
    assert files.unread(4) == first
    files.take(first)
    assert [step for step, _ in taken(files)] == list(range(2, 10))


def test_a_damaged_line_is_skipped_and_read_only_once(folder, append, caplog):
    append(1, text(1, loss=1.0) + "no json\n" + text(2, loss=0.5) + "{}\n")
    files = GrowingMetrics(folder)
    assert taken(files) == [(1, {"loss": 1.0}), (2, {"loss": 0.5})]
    assert files.unread(1000) == []
    assert len([record for record in caplog.records if "is damaged" in record.getMessage()]) == 2


def test_bytes_that_may_not_be_read_yet_wait(folder, append):
    append(1, text(1) + text(2))
    readable = len(text(1))
    files = GrowingMetrics(folder, lambda path: readable)
    assert [step for step, _ in taken(files)] == [1]
    assert files.unread(1000) == []
    readable += len(text(2))
    assert [step for step, _ in taken(files)] == [2]


def test_the_first_value_of_a_repeated_step_counts(folder, append):
    append(1, text(1, loss=1.0) + text(2, loss=0.5))
    append(2, text(2, loss=0.6, kl=0.1) + text(3, loss=0.4))
    assert first_values(folder) == {"loss": {1: 1.0, 2: 0.5, 3: 0.4}, "kl": {2: 0.1}}
