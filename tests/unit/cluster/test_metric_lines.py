"""The format of metric files, byte for byte, and what readers make of half lines and damaged lines."""

import io
import json

import pytest

from cluster.metric_lines import (
    LineInFile,
    MetricLine,
    MetricsWriter,
    last_metric_line,
    lines_in_file,
    metric_lines,
    system_metrics_file,
)

DAMAGED = [b"{}", b"[1]", b"no json", b'{"step": 1, "time": 2, "metrics": {"a": "b"}}', b"\xff"]


def line(step: int, **metrics: float) -> MetricLine:
    return MetricLine(step, 100.0 + step, metrics)


def test_the_text_of_a_line_is_fixed():
    text = MetricLine(3, 1712000000.5, {"loss": 0.25, "system/ä": 2}).text()
    assert text == '{"step": 3, "time": 1712000000.5, "metrics": {"loss": 0.25, "system/\\u00e4": 2}}\n'
    assert system_metrics_file("n_1") == "system-n_1.jsonl"


@pytest.mark.parametrize("metrics", [{}, {"loss": 0.1}, {"a": float("inf"), "b": -1e300}])
def test_a_line_that_was_written_is_read_back(metrics):
    written = line(7, **metrics)
    assert MetricLine.parse(written.text().encode()) == written


def test_nan_is_a_metric():
    read = MetricLine.parse(line(1, loss=float("nan")).text().encode())
    assert read.metrics["loss"] != read.metrics["loss"]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_line_is_refused(text):
    with pytest.raises(ValueError):
        MetricLine.parse(text)


def test_half_a_line_at_the_end_is_left_until_it_is_whole(tmp_path):
    path, first, second = tmp_path / "m.jsonl", line(1, loss=1.0), line(2, loss=0.5)
    path.write_text(first.text() + second.text()[:-1])
    (only,) = lines_in_file(path)
    assert only == LineInFile(path, len(first.text()), first)
    assert last_metric_line(path) == first
    path.write_text(first.text() + second.text())
    assert [later.content for later in lines_in_file(path, start=only.end)] == [second]
    assert last_metric_line(path) == second


def test_no_line_beyond_the_end_that_may_be_read_is_given(tmp_path):
    path, first = tmp_path / "m.jsonl", line(1).text()
    path.write_text(first + line(2).text())
    assert len(list(lines_in_file(path, end=len(first)))) == 1
    assert list(lines_in_file(path, end=len(first) - 1)) == []


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_line_is_reported_with_its_position_and_skipped(tmp_path, caplog, text):
    path = tmp_path / "m.jsonl"
    path.write_bytes(line(1).text().encode() + text + b"\n" + line(2).text().encode() + text + b"\n")
    steps = [read.content.step if read.content else None for read in lines_in_file(path)]
    assert steps == [1, None, 2, None]
    end = len(line(1).text()) + len(text) + 1
    assert f"{path}: the line that ends at byte {end} is damaged" in caplog.text
    assert [read.step for read in metric_lines(path)] == [1, 2]
    assert last_metric_line(path) == line(2)


def test_a_file_without_a_whole_line_has_no_last_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(line(1).text()[:10])
    assert last_metric_line(path) is None


def test_a_writer_appends_lines_that_are_there_at_once(tmp_path):
    path = tmp_path / "attempts" / "1" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.append(1, {"loss": 1.0})
        assert [read.step for read in metric_lines(path)] == [1]
        writer.append(2, {"long": 0.5, **{f"metric_{number}": 0.5 for number in range(1000)}})
        writer.sync()
        assert [read.step for read in metric_lines(path)] == [1, 2]
    with MetricsWriter(path) as writer:
        writer.append(3, {"loss": 0.1})
    contents = [json.loads(text) for text in path.read_text().splitlines()]
    assert [content["step"] for content in contents] == [1, 2, 3]
    assert list(contents[0]) == ["step", "time", "metrics"] and contents[0]["time"] > 1.7e9


class CountingFile(io.FileIO):
    num_writes = 0

    def write(self, data) -> int:
        self.num_writes += 1
        return super().write(data)


def test_every_line_is_one_write(tmp_path):
    """A kill between two writes would leave half a line, and the lines of two writers could mix."""
    path = tmp_path / "m.jsonl"
    raw = CountingFile(path, "ab")
    with MetricsWriter(path) as writer:
        writer._file = io.BufferedWriter(raw)
        for step, num_metrics in ((1, 1), (2, 5000), (3, 1)):
            writer.append(step, {f"metric_{number}": 0.5 for number in range(num_metrics)})
    assert raw.num_writes == 3
    assert [read.step for read in metric_lines(path)] == [1, 2, 3]
