"""Tasks and actors on a real local Ray: order, bounds, failures, dead workers."""

import os
import time
from pathlib import Path

import pytest

from cluster.ray_session import ray_session
from cluster.site import Site
from cluster.tasks import WorkerLost, actor_pool, map_tasks

SITE = Site.model_validate({"resources": {"tasks": 2, "actors": 2, "max_retries": 2}})


@pytest.fixture(scope="module", autouse=True)
def ray():
    with ray_session(SITE):
        yield


def die_until(marks: Path, item: int, num_deaths: int) -> None:
    """End this process abruptly, as the kernel's OOM killer would, the first `num_deaths` times."""
    for death in range(num_deaths):
        mark = marks / f"{item}-{death}"
        if not mark.exists():
            mark.touch()
            os._exit(1)


def test_every_item_gives_one_result_with_its_number():
    results = dict(map_tasks(lambda item: item * item, [3, 1, 4, 1, 5], site=SITE))
    assert results == {0: 9, 1: 1, 2: 16, 3: 1, 4: 25}
    assert list(map_tasks(abs, [], site=SITE)) == []


def test_results_come_in_the_order_of_completion_and_items_are_read_as_tasks_complete(tmp_path):
    read, may_end = [], tmp_path / "may-end"

    def items():
        for item in range(4):
            read.append(item)
            yield item

    def work(item: int) -> None:
        while item == 0 and not may_end.exists():
            time.sleep(0.05)

    iterator = map_tasks(work, items(), site=SITE)
    first, _ = next(iterator)
    assert first == 1
    assert len(read) == 2, "two tasks at a time, and the second result was not asked for yet"
    may_end.touch()
    assert sorted(number for number, _ in iterator) == [0, 2, 3]


def test_a_dead_worker_is_replaced_and_its_item_tried_again(tmp_path, caplog):
    def work(item: int) -> int:
        die_until(tmp_path, item, 2 if item == 1 else 0)
        return item

    assert sorted(map_tasks(work, range(4), site=SITE)) == [(item, item) for item in range(4)]
    retries = [record.getMessage() for record in caplog.records if "trying again" in record.getMessage()]
    assert len(retries) == 2
    assert all("item 1 of " in retry for retry in retries)


def test_an_item_that_always_kills_its_worker_is_named(tmp_path):
    def work(item: str) -> None:
        if item == "bad":
            os._exit(1)

    with pytest.raises(WorkerLost, match=r"item 1 of .*work \('bad'\): its worker died 3 times"):
        list(map_tasks(work, ["good", "bad"], site=SITE))


def test_an_exception_keeps_its_type_and_names_its_item():
    def work(item: int) -> int:
        if item == 7:
            raise ZeroDivisionError("no")
        return item

    with pytest.raises(ZeroDivisionError) as error:
        list(map_tasks(work, [5, 7], site=SITE))
    assert any("in item 1 of" in note and note.endswith(": 7") for note in error.value.__notes__)
    assert "work" in str(error.value.__cause__), "the worker's traceback is missing"


def test_an_error_of_check_kills_the_running_tasks(tmp_path):
    num_calls = 0

    def check() -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise KeyboardInterrupt

    def work(item: int) -> None:
        time.sleep(300)
        (tmp_path / f"ended-{item}").touch()

    with pytest.raises(KeyboardInterrupt):
        list(map_tasks(work, range(2), site=SITE, check=check))
    # They had both CPUs, so these tasks can only run before the others end if the others were killed.
    assert sorted(map_tasks(abs, [1, 2], site=SITE)) == [(0, 1), (1, 2)]
    assert not list(tmp_path.glob("ended-*"))


class Model:
    def __init__(self, folder: Path, fails: bool = False) -> None:
        if fails:
            raise FileNotFoundError("no model here")
        (folder / f"built-{os.getpid()}").touch()
        self.folder = folder

    def score(self, item: int) -> tuple[int, int]:
        die_until(self.folder, item, 1 if item == 3 else 0)
        time.sleep(0.05)
        return item * 10, os.getpid()


def test_actors_build_their_model_once_and_a_dead_one_is_replaced(tmp_path):
    results = dict(actor_pool(Model, [tmp_path], range(8), "score", site=SITE))
    assert {number: value for number, (value, _) in results.items()} == {n: n * 10 for n in range(8)}
    built = list(tmp_path.glob("built-*"))
    assert len(built) == 3, "two actors, and one that replaced the dead one"
    assert {pid for _, pid in results.values()} <= {int(path.name.removeprefix("built-")) for path in built}


def test_more_actors_than_cpus_also_finish(tmp_path):
    """On a cluster that is smaller than asked for, actors take turns instead of waiting forever."""
    site = SITE.model_copy(update={"resources": SITE.resources.model_copy(update={"actors": 4})})
    results = dict(actor_pool(Model, [tmp_path], [10, 11, 12, 13], "score", site=site))
    assert {number: value for number, (value, _) in results.items()} == {0: 100, 1: 110, 2: 120, 3: 130}


def test_a_model_that_cannot_be_built_is_an_ordinary_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model here"):
        list(actor_pool(Model, [tmp_path, True], range(2), "score", site=SITE))


def test_an_actor_that_always_dies_is_named(tmp_path):
    class Deadly:
        def call(self, item: int) -> None:
            os._exit(1)

    with pytest.raises(WorkerLost, match=r"item 0 of .*Deadly\.call \(0\): its worker died 3 times"):
        list(actor_pool(Deadly, [], [0], "call", site=SITE))
