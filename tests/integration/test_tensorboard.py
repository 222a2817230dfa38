"""Event files for TensorBoard: every step once, also after a kill; nothing without the site's switch."""

import signal
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from tests.integration.tiny_pipeline.project import TinyProject
from tests.waiting import wait_until


def steps(folder: Path, name: str) -> list[int]:
    """Return the steps of a metric in all event files of a folder: TFRecords of Event messages."""
    values = []
    for path in folder.glob("events.*"):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (size,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + size])
            values += [event.step for value in event.summary.value if value.tag == name]
            start += 16 + size
    return sorted(values)


@pytest.fixture
def project(tmp_path):
    project = TinyProject(tmp_path / "project")
    yield project
    project.close()


def test_a_resumed_run_has_every_step_once(project):
    site = "name: tiny\ntracking: {enabled: false, tensorboard: true}\n"
    (project.folder / "site.yaml").write_text(site)
    process, _ = project.pause("square:2")
    [run] = project.runs()
    folder = project.storage / "runs" / run / "tensorboard"
    wait_until(lambda: steps(folder / "square", "square/length") == [0, 1], process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    project.vico("run")
    assert {path.name for path in folder.iterdir()} == {"draw", "square", "total"}
    for stage in ("draw", "square"):
        assert steps(folder / stage, f"{stage}/length") == [0, 1, 2, 3]


def test_without_the_switch_there_are_no_event_files(project):
    project.vico("run")
    assert not list(project.storage.rglob("events.*"))
