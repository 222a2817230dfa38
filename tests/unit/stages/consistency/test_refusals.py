"""What the consistency stage refuses before a worker starts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.train_settings import TrainSettings
from stages.consistency.config import ConsistencyConfig, JointConsistencyConfig
from stages.consistency.disk import KeptBytes, check_disk
from stages.consistency.packs import ConsistencySettings, JointInputs, check_connector_start
from stages.losses_policy import policy_digest
from stages.outputs import METRICS_FILE
from stages.parts import Parts
from stages.training.checkpoints import METADATA_FILE
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.checkpoints.save import save_model
from vico.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("refusals") / "m")


def settings_of(model: Path, folder: Path, dtype: str = "float32") -> ConsistencySettings:
    config = ConsistencyConfig(seed=0, optimizer={"dtype": dtype})
    return ConsistencySettings(
        config, folder, model, Parts(folder, 1), TrainSettings(checkpoints={"keep": 2})
    )


def with_free(monkeypatch, num_bytes: int) -> None:
    usage = shutil._ntuple_diskusage(10**12, 0, num_bytes)
    monkeypatch.setattr("stages.consistency.disk.shutil.disk_usage", lambda _: usage)


@pytest.mark.parametrize(
    ("dtype", "checkpoint_bytes", "weight_bytes"), [("float32", 16, 4), ("bfloat16", 14, 2)]
)
def test_a_disk_without_room_for_one_more_checkpoint_than_are_kept_and_the_policy_is_refused(
    model, tmp_path, monkeypatch, dtype, checkpoint_bytes, weight_bytes
):
    num_parameters = sum(parameter.numel() for parameter in load_model(model).parameters())
    settings = settings_of(model, tmp_path, dtype)
    with_free(monkeypatch, int(1.11 * (3 * checkpoint_bytes + weight_bytes) * num_parameters))
    check_disk(settings, 2, KeptBytes())
    with_free(monkeypatch, (3 * checkpoint_bytes + weight_bytes) * num_parameters)
    with pytest.raises(
        UserError, match=r"storage=.* GB free, but consistency .*train\.checkpoints\.keep=2 .*--storage"
    ):
        check_disk(settings, 2, KeptBytes())


def test_existing_checkpoints_need_room_only_for_another_number_of_ranks(model, tmp_path, monkeypatch):
    num_parameters = sum(parameter.numel() for parameter in load_model(model).parameters())
    for step in (4, 8):
        folder = tmp_path / f"output/checkpoints/step-{step:07d}"
        folder.mkdir(parents=True)
        (folder / METADATA_FILE).write_text(json.dumps({"world_size": 2}))
    settings = settings_of(model, tmp_path)
    with_free(monkeypatch, int(1.11 * (16 + 4) * num_parameters))
    check_disk(settings, 2, KeptBytes())
    with pytest.raises(UserError, match="the last one converted for another number of ranks"):
        check_disk(settings, 3, KeptBytes())
    with_free(monkeypatch, int(1.11 * (3 * 16 + 4) * num_parameters))
    check_disk(settings, 3, KeptBytes())
    with_free(monkeypatch, (16 + 4) * num_parameters)
    with pytest.raises(UserError, match="GB free"):
        check_disk(settings, 2, KeptBytes())


def test_an_existing_best_policy_needs_no_room(model, tmp_path, monkeypatch):
    num_parameters = sum(parameter.numel() for parameter in load_model(model).parameters())
    settings = settings_of(model, tmp_path)
    settings = replace(settings, config=settings.config.model_copy(update={"select": "best"}))
    with_free(monkeypatch, int(1.11 * (3 * 16 + 2 * 4) * num_parameters))
    with pytest.raises(UserError, match="3 model folders"):
        check_disk(settings, 2, KeptBytes())
    (tmp_path / "output/best/step-0000004").mkdir(parents=True)
    check_disk(settings, 2, KeptBytes())


def test_an_object_store_needs_room_for_the_checkpoint_that_is_uploading(model, tmp_path, monkeypatch):
    num_parameters = sum(parameter.numel() for parameter in load_model(model).parameters())
    with_free(monkeypatch, int(1.11 * (3 * 16 + 4) * num_parameters))
    check_disk(settings_of(model, tmp_path), 2, KeptBytes())
    with pytest.raises(
        UserError, match=r"^work=.* 4 more checkpoints .* and 2 more\).*another `work` in the"
    ):
        check_disk(settings_of(model, tmp_path), 2, KeptBytes(), remote=True)


def test_a_start_for_a_connector_that_the_model_has_already_is_refused(model, tmp_path):
    settings = settings_of(model, tmp_path)
    started = replace(settings, config=settings.config.model_copy(update={"connector_start": "random"}))
    check_connector_start(started)
    policy = load_model(model)
    policy.add_compressed_connector(0)
    save_model(policy.state_dict(), model, tmp_path / "policy")
    check_connector_start(replace(settings, model_folder=tmp_path / "policy"))
    with pytest.raises(UserError, match=r"connector_start=random has no effect: .* has a compressed"):
        check_connector_start(replace(started, model_folder=tmp_path / "policy"))


def test_the_joint_policy_starts_from_the_first_one_and_rates_of_another_router_are_refused(model, tmp_path):
    import torch

    from stages.consistency.worker import start_policy

    policy = load_model(model)
    policy.add_compressed_connector(1)
    with torch.no_grad():
        policy.lm_head.weight.add_(0.5)
    policy_folder = tmp_path / "policy"
    save_model(policy.state_dict(), model, policy_folder)
    joint = JointInputs(policy_folder, tmp_path)
    settings = replace(settings_of(model, tmp_path), config=JointConsistencyConfig(seed=0), joint=joint)
    started = start_policy(settings, load_model).state_dict()
    assert all(torch.equal(started[name], tensor) for name, tensor in policy.state_dict().items())
    assert settings.seed != settings.config.seed == replace(settings, joint=None).seed
    metrics = {"policy": policy_digest(policy_folder), "absolute_threshold": 0.5}
    (tmp_path / METRICS_FILE).write_text(json.dumps(metrics))
    joint.check()
    (tmp_path / METRICS_FILE).write_text(json.dumps({**metrics, "policy": policy_digest(model)}))
    with pytest.raises(UserError, match=r"of another policy than .*leave out inputs.adopt.joint_rates$"):
        joint.check()
