"""`vico logs`: lines as they are written, of a run or of one of its stages."""

import threading
import time

import pytest

from pipeline.explain.logs import Tail, log_lines
from pipeline.results.runs import Runs
from pipeline.storage.leases import Leases, holder_at_work
from vico.errors import UserError


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


@pytest.fixture
def run(runs):
    return runs.create(pipeline="p", fingerprints={"shard": "a"}, experiment="e", config={}, site="s")


def test_a_tail_yields_whole_lines_as_they_come(tmp_path):
    path = tmp_path / "log"
    tail = Tail(path, "> ")
    assert list(tail.lines()) == []
    path.write_bytes("één\ntw".encode())
    assert list(tail.lines()) == ["> één"]
    with path.open("ab") as file:
        file.write(b"o\n\xff\nrest")
    assert list(tail.lines()) == ["> two", "> �"]
    assert list(tail.lines(to_end=True)) == ["> rest"]


def test_following_continues_until_the_run_ends_and_misses_nothing(runs, run):
    path = runs.run_folder(run.run) / "driver.log"

    def drive():
        with Leases(runs.storage).acquire(runs.run_folder(run.run), run.run) as lease:
            for state in ("running", "done"):
                time.sleep(0.4)
                with path.open("a") as file:
                    file.write(f"line before {state}\n")
                run.state = state
                runs.save(run, lease)
            time.sleep(1)  # the driver still sends metrics and stops Ray
            with path.open("a") as file:
                file.write("line after done\n")

    driver = threading.Thread(target=drive)
    driver.start()
    lines = list(log_lines(runs, "latest", stage=None, follow=True))
    assert holder_at_work(runs.run_folder(run.run)) is None, "vico gc may follow at once"
    driver.join()
    assert lines == ["line before running", "line before done", "line after done"]


def test_the_logs_of_a_stage_are_those_of_its_driver_and_ranks(runs, run, tmp_path):
    run.stages["shard"].attempt = 2
    runs.save(run)
    folder = tmp_path / "shard" / "a" / "attempts" / "2"
    folder.mkdir(parents=True)
    for name in ("driver", "rank-10", "rank-2"):
        (folder / f"{name}.log").write_text(f"of {name}\n")
    lines = list(log_lines(runs, run.run, stage="shard", follow=False))
    assert lines == ["of driver", "[rank-2] of rank-2", "[rank-10] of rank-10"]
    with pytest.raises(UserError, match="--stage='label' is not a stage of run"):
        list(log_lines(runs, run.run, stage="label", follow=False))


def test_a_run_that_has_written_nothing_has_no_lines(runs, run):
    assert list(log_lines(runs, run.run, stage=None, follow=False)) == []
    assert list(log_lines(runs, run.run, stage="shard", follow=False)) == []
