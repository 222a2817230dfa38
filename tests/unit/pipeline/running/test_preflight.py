"""GPUs that a site asks for and a machine lacks are one line, before anything starts."""

from pathlib import Path

import pytest

from cluster.settings.blocks import RaySettings, Resources
from cluster.site import Site
from pipeline.config.graph import pipeline_graph
from pipeline.planning.request import RunRequest, open_pipeline
from pipeline.running.preflight import check_gpus, num_local_gpus
from vico.errors import UserError

ROOT = Path(__file__).parents[4]


@pytest.fixture
def devices(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "visible, number",
    [(None, 2), ("0,1,2,3", 2), ("1", 1), ("", 0), ("-1", 0), ("MIG-a,MIG-b,MIG-c", 3)],
)
def test_visible_devices_limit_the_gpus(devices, monkeypatch, visible, number):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert num_local_gpus(devices) == number


def test_gpus_of_a_wsl_are_not_counted(tmp_path):
    (tmp_path / "dxg").touch()
    assert num_local_gpus(tmp_path) is None


def test_absent_gpus_are_refused_unless_a_cluster_has_them(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    resources = Resources(workers=2, actors=1, gpus_per_worker=1)
    site = Site(storage=tmp_path, resources=resources)
    opened = open_pipeline(RunRequest(Path("configs/quickstart.yaml"), site), pipeline_graph())
    with pytest.raises(UserError, match=r"gpus_per_worker=1 with resources.workers=2 takes 2 GPUs") as raised:
        check_gpus(site, opened)
    assert "this machine has 0" in str(raised.value) and "\n" not in str(raised.value)
    check_gpus(site.model_copy(update={"ray": RaySettings(address="head:6379")}), opened)
    check_gpus(Site(storage=tmp_path), opened)
