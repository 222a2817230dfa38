"""Lines and bars of a running command."""

import errno
import io
import logging
import re
import threading

import pytest
from rich.console import Console

from pipeline.terminal import progress
from pipeline.terminal.progress import Display, Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_come_every_ten_seconds_with_the_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Display(stream) as display:
        display.stage_started("shard", "shard: starts")
        for done in range(101):
            display.progress("shard", Progress(done, 100, "rows"))
            now[0] += 0.5
        display.stage_ended("shard", "shard: done")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "shard: starts" and lines[-1] == "shard: done"
    assert len(lines) == 2 + 5
    assert lines[1] == "shard: 20/100 rows, about 40.0 s left"
    assert not any("\x1b" in line for line in lines)


def test_work_done_before_this_command_does_not_enter_the_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    display = Display(stream)
    display.stage_started("train", "resumes")
    for done in (0, 0, 900, 905, 910):
        now[0] += 5.0
        display.progress("train", Progress(done, 1000, "steps"))
    assert stream.getvalue().splitlines()[-1] == "train: 905/1000 steps, about 1 min 35 s left"


def test_the_time_left_of_the_next_work_does_not_contain_that_of_the_last(monkeypatch):
    """A stage may have several kinds of work, such as ratios of other questions and then test samples."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    display = Display(stream)
    display.stage_started("evaluate", "starts")
    for done, unit in ((0, "blocks"), (100, "blocks"), (200, "blocks"), (10, "samples"), (20, "samples")):
        now[0] += 20.0
        display.progress("evaluate", Progress(done, 200 if unit == "blocks" else 1000, unit))
    assert stream.getvalue().splitlines()[-2:] == [
        "evaluate: 10/1000 samples",
        "evaluate: 20/1000 samples, about 32 min 40 s left",
    ]


def test_a_terminal_gets_bars(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with Display(stream) as display:
        display.stage_started("shard", "shard: starts")
        display.progress("shard", Progress(3, 7, "rows"))
        display.stage_ended("shard", "shard: done")
    assert "3/7" in stream.getvalue() and "rows" in stream.getvalue()
    assert "shard: done" in stream.getvalue()


def shown_on_terminal(text):
    """Return the lines of a text that a terminal got, without escapes."""
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", text).split("\n")]


def test_a_terminal_gets_no_broken_word(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    stream, words = Terminal(), [f"last_kl_per_token_{n} 0.00926" for n in range(9)]
    path = "/mnt/storage/" + "long/" * 14 + "driver.log"
    with Display(stream) as display:
        display.line(f"consistency: done in 3 min 54 s: {', '.join(words)}")
        display.line(f"consistency failed: see {path}")
    lines = shown_on_terminal(stream.getvalue())
    assert all(any(word.split()[0] in line for line in lines) for word in words)
    assert all(len(line) <= 80 for line in lines if path not in line)
    assert any(line.strip() == path for line in lines)


def test_a_stage_that_did_not_end_leaves_no_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with Display(stream) as display:
        display.stage_started("ratio", "ratio: starts")
        display.progress("ratio", Progress(0, 2, "shards"))
        display.line("run r: interrupted")
        during = stream.getvalue()
    last = stream.getvalue()[len(during) :]
    assert "0/2 shards" not in last


FIGURES = {"loss": 0.41234, "learning_rate": 2.9e-4, "tokens_per_second": 1240.4}


def test_a_training_shows_loss_learning_rate_speed_and_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    display = Display(stream)
    display.stage_started("consistency", "starts")
    for done in (10, 20):
        now[0] += 50.0
        display.progress("consistency", Progress(done, 250, "steps", FIGURES))
    last = stream.getvalue().splitlines()[-1]
    expected = "consistency: 20/250 steps, loss 0.412, lr 2.9e-04, 1,240 tokens/s, about 19 min 10 s left"
    assert last == expected


@pytest.mark.parametrize("width, has_bar", [(80, False), (120, True)])
def test_the_bar_of_a_training_fits_the_terminal(monkeypatch, width, has_bar):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = Terminal()
    with Display(stream) as display:
        display.stage_started("consistency", "starts")
        for done in (1000, 1200):
            now[0] += 500.0
            display.progress("consistency", Progress(done, 2500, "steps", FIGURES))
        console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
        console.print(display._bars.get_renderable())
        shown = console.file.getvalue()
    [line] = shown.splitlines()
    for text in ("1200/2500 steps", "0:54:10 left", "loss 0.412", "lr 2.9e-04", "1,240 tokens/s"):
        assert text in line
    assert ("━" in line) == has_bar


def test_own_warnings_are_shown_once_and_those_of_libraries_only_logged(caplog):
    stream = io.StringIO()
    with Display(stream):
        for _ in range(2):
            logging.getLogger("stages.shard.stage").warning("the split %s has no sample", "test")
        logging.getLogger("pipeline.tracking.thread").warning("MLflow at http://me:secret@host/: no answer")
        logging.getLogger("ray").warning("chatter")
        logging.getLogger("pipeline.running.driver").error("the command ends with this")
    logging.getLogger("stages.shard.stage").warning("after the command")
    assert stream.getvalue().splitlines() == [
        "warning: the split test has no sample",
        "warning: MLflow at http://host/: no answer",
    ]
    assert "chatter" in caplog.text


def test_progress_may_come_from_threads_and_after_the_stage_has_ended():
    stream = io.StringIO()
    display = Display(stream)
    display.stage_started("shard", "starts")
    threads = [
        threading.Thread(target=display.progress, args=("shard", Progress(n, 9, "rows"))) for n in range(9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    display.stage_ended("shard", "ends")
    display.progress("shard", Progress(9, 9, "rows"))
    assert stream.getvalue() == "starts\nends\n"


def test_every_line_is_in_the_log_too(caplog):
    caplog.set_level(logging.INFO)
    display = Display(io.StringIO())
    display.line("run [x]: 100%s")
    assert caplog.messages == ["run [x]: 100%s"]


@pytest.mark.parametrize(
    "seconds, text",
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min")],
)
def test_durations_are_written_as_people_write_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "pipe"), OSError(errno.EIO, "terminal")])
def test_a_lost_terminal_or_pipe_does_not_end_the_command(error, caplog, capfd):
    """When `| tee` gets the same Ctrl-C, or ssh is lost, the ranks still have time for a checkpoint, and
    standard output still works at the end of the command."""

    class Gone(io.StringIO):
        def write(self, text):
            raise error

    caplog.set_level("INFO")
    with Display(Gone()) as display:
        display.line("SIGHUP: the ranks end their step")
        display.line("SIGHUP: again")
    assert "the ranks end their step" in caplog.text
    print("the answer")
    assert capfd.readouterr().out == "the answer\n"
