"""Pictures of several clients are decoded in turn."""

import hashlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.serving.picture_work import PictureWork
from pipeline.serving.pictures import Picture
from pipeline.serving.running import Running
from tests.served import encoded, picture
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Any:
    return load_model(make_tiny_model(tmp_path_factory.mktemp("model") / "m"))


def running(model: Any, client: str, seeds: range) -> Running:
    contents = [encoded(picture(seed)) for seed in seeds]
    pictures = [Picture(data, 190, 130, None, "p", hashlib.sha256(data).digest()) for data in contents]
    tilings = [model.settings.tiling()] * len(pictures)
    job: Any = SimpleNamespace(
        client=client,
        is_over=False,
        chat=SimpleNamespace(pictures=pictures),
        prompt=SimpleNamespace(tilings=tilings),
    )
    return Running(job, None, None)  # type: ignore[arg-type]


def finished_in_order(work: PictureWork, jobs: list[Running], wake: threading.Event) -> list[tuple[str, int]]:
    """Run the work to its end; return (client, number) of the pictures in the order in which they end."""
    done: list[tuple[str, int]] = []
    while any(job.encoded is None for job in jobs if not job.job.is_over):
        work.work()
        for job in jobs:
            numbers = [n for n, entry in enumerate(job.pictures) if entry is not None]
            done += [(job.job.client, n) for n in numbers if (job.job.client, n) not in done]
        wake.wait(0.05)
        wake.clear()
    return done


def test_a_client_with_many_pictures_delays_another_by_one_of_its_own(model: Any) -> None:
    wake = threading.Event()
    work = PictureWork(model, 0, wake.set)
    many, one = running(model, "many", range(6)), running(model, "one", range(10, 11))
    work.add(many)
    work.add(one)
    order = finished_in_order(work, [many, one], wake)
    assert order.index(("one", 0)) <= 1, order
    assert [entry for entry in order if entry[0] == "many"] == [("many", n) for n in range(6)]
    work.close()


def test_pictures_of_a_job_that_ended_are_not_decoded(model: Any) -> None:
    wake = threading.Event()
    work = PictureWork(model, 0, wake.set)
    left, stays = running(model, "a", range(6)), running(model, "a", range(10, 12))
    work.add(left)
    work.add(stays)
    left.job.is_over = True  # type: ignore[misc]
    work.forget(left)
    assert finished_in_order(work, [left, stays], wake) == [("a", 0), ("a", 1)]
    assert left.pictures == [None] * 6
    work.close()
