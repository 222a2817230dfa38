"""Work of the ranks before the first step: what the driver sees of it, and its end after a stop notice."""

import pytest
import torch

from stages.training.faults import Preempted, write_notice
from stages.training.ranks.follower import Follower
from stages.training.ranks.phases import PHASE_FILE, phase_items, read_phase
from tests.stage_context import stage_context
from tests.waiting import wait_until

UNIT = "shards of vision features"


@pytest.fixture
def as_rank(monkeypatch):
    """Returns a function that makes this process a rank of several."""

    def become(rank: int, world_size: int) -> None:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)

    monkeypatch.setattr("stages.training.ranks.phases._WRITE_EVERY_S", 0.0)
    return become


def seen(items, total, folder):
    return [read_phase(folder) for _ in phase_items(items, total, UNIT, folder, may_stop=True)]


def test_rank_0_says_how_far_all_ranks_are_and_nothing_when_they_are_done(tmp_path, as_rank):
    as_rank(0, 2)
    folder = tmp_path / "attempts/1"
    assert seen("abc", 5, folder) == [(0, 5, UNIT), (2, 5, UNIT), (4, 5, UNIT)]
    assert read_phase(folder) is None and not (folder / PHASE_FILE).exists()
    as_rank(1, 2)
    assert seen("abc", 5, folder) == [None, None, None]


def test_a_phase_that_fails_is_over(tmp_path, as_rank):
    as_rank(0, 1)
    with pytest.raises(ZeroDivisionError):
        for _ in phase_items("abc", 3, UNIT, tmp_path, may_stop=True):
            assert read_phase(tmp_path)
            1 / 0  # noqa: B018
    assert read_phase(tmp_path) is None


@pytest.mark.parametrize("may_stop", [True, False])
def test_a_stop_notice_ends_a_phase_between_two_items_if_the_next_start_finds_them(
    tmp_path, as_rank, may_stop
):
    as_rank(0, 2)
    done = []

    def run() -> None:
        for item in phase_items("abc", 6, UNIT, tmp_path, may_stop=may_stop):
            done.append(item)
            if item == "b":
                write_notice(tmp_path, 0, "driver: Interrupted\n")

    if may_stop:
        with pytest.raises(Preempted, match=f"rank 0 got a stop notice; its {UNIT} so far are kept"):
            run()
    else:
        run()
    assert "".join(done) == ("ab" if may_stop else "abc")
    assert read_phase(tmp_path) is None


def test_the_driver_shows_the_phase_and_then_the_steps_again(tmp_path, as_rank, monkeypatch):
    monkeypatch.setattr("stages.training.ranks.follower._FOLLOW_S", 0.01)
    as_rank(0, 2)
    context = stage_context("consistency", tmp_path, {})
    with Follower(context, 60):
        wait_until(lambda: context.reported)
        for number, _ in enumerate(phase_items("abc", 6, UNIT, context.parts.attempt_folder, may_stop=True)):
            wait_until(lambda shown=(2 * number, 6, UNIT): shown in context.reported)
        wait_until(lambda: context.reported[-1] == (0, 60, "steps"))
    distinct = [report for i, report in enumerate(context.reported) if report not in context.reported[:i]]
    assert distinct == [(0, 60, "steps"), (0, 6, UNIT), (2, 6, UNIT), (4, 6, UNIT)]


@pytest.mark.parametrize("content", ["", "[1, 2", "3", "[1, 2]"])
def test_a_file_that_is_no_phase_is_none(tmp_path, content):
    (tmp_path / PHASE_FILE).write_text(content)
    assert read_phase(tmp_path) is None
