"""Pickles with code in every kind of state file: nothing runs, in the real resume and the real conversion.

The one who plants them can also write the digests anew, so both is tried: with the old digests the change is
found, with new ones the code is refused.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from cluster.train_settings import MemorySettings
from stages.parts import Parts
from stages.training.checkpoints import METADATA_FILE, STATE, CheckpointDiffers, checkpoints
from stages.training.state_digests import digests_below, state_files
from stages.training.universal import ConversionFailed, convert_last_checkpoint
from tests.numerics.ranks import finish, start_ranks
from tests.tiny_model import make_tiny_model

STAGES = (1, 2, 3)
KINDS = ("model_states.pt", "optim_states.pt")
UNIVERSAL_KINDS = (*KINDS, "fp32.pt", "exp_avg.pt", "step.pt", "optimizer_state.pt")


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self._marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self._marker,)


def plant(checkpoint: Path, kind: str, marker: Path, *, new_digests: bool) -> bool:
    """Put a pickle into all state files of a kind; return whether there are any."""
    paths = [path for path in (checkpoint / STATE).rglob("*.pt") if path.name.endswith(kind)]
    for path in paths:
        content = torch.load(path, weights_only=False)
        planted = Planted(marker)
        torch.save({**content, "planted": planted} if isinstance(content, dict) else [content, planted], path)
    if new_digests:
        metadata = json.loads((checkpoint / METADATA_FILE).read_text())
        metadata["files"] = digests_below(checkpoint / STATE)
        (checkpoint / METADATA_FILE).write_text(json.dumps(metadata))
    return bool(paths)


def run(model: Path, folder: Path, scenarios: list[tuple[str, int]], world_size: int) -> None:
    logs = folder / f"logs-{world_size}-{len(list(folder.glob('logs-*')))}"
    texts = [
        json.dumps({"name": name, "zero_stage": stage, "attempt": 1, "stop_after": 6})
        for name, stage in scenarios
    ]
    finish(
        start_ranks("tests.numerics.training_case", [str(model), str(folder), *texts], logs, world_size), logs
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture(scope="module")
def written(model, tmp_path_factory) -> Path:
    """One checkpoint of 2 ranks per ZeRO stage."""
    folder = tmp_path_factory.mktemp("written")
    run(model, folder, [(f"zero-{stage}", stage) for stage in STAGES], 2)
    return folder


def test_a_checkpoint_has_the_digests_of_all_its_state_files(written):
    for stage in STAGES:
        [(_, checkpoint)] = checkpoints(Parts(written / f"zero-{stage}", 1))
        metadata = json.loads((checkpoint / METADATA_FILE).read_text())
        assert metadata["files"] == digests_below(checkpoint / STATE)
        assert len(metadata["files"]) == (4 if stage == 3 else 3)
        assert {path.name for path in checkpoint.iterdir()} == {METADATA_FILE, STATE}, "no programs"


def test_planted_code_does_not_run_on_resume(model, written, tmp_path):
    scenarios, names = [], []
    for stage in STAGES:
        for kind in KINDS:
            for digests in ("old", "new"):
                name = f"zero-{stage}-{kind}-{digests}"
                shutil.copytree(written / f"zero-{stage}", tmp_path / name)
                [(_, checkpoint)] = checkpoints(Parts(tmp_path / name, 1))
                assert plant(checkpoint, kind, tmp_path / f"ran-{name}", new_digests=digests == "new")
                scenarios.append((name, stage))
                names.append(name)
    run(model, tmp_path, scenarios, 2)
    assert not list(tmp_path.glob("ran-*"))
    for name in names:
        for rank in (0, 1):
            outcome = (tmp_path / name / f"outcome-{rank}.txt").read_text()
            assert outcome.startswith("CheckpointDiffers: ") and "to resume from the first step" in outcome
            reason = "holds more than tensors" if name.endswith("new") else "were written"
            assert reason in outcome, outcome


def test_a_checkpoint_without_digests_is_loaded_without_running_code(model, written, tmp_path):
    for name in ("plain", "planted"):
        shutil.copytree(written / "zero-2", tmp_path / name)
        [(_, checkpoint)] = checkpoints(Parts(tmp_path / name, 1))
        if name == "planted":
            plant(checkpoint, "optim_states.pt", tmp_path / "ran", new_digests=False)
        metadata = json.loads((checkpoint / METADATA_FILE).read_text())
        del metadata["files"]
        (checkpoint / METADATA_FILE).write_text(json.dumps(metadata))
    run(model, tmp_path, [("plain", 2), ("planted", 2)], 2)
    assert not (tmp_path / "ran").exists()
    assert "holds more than tensors" in (tmp_path / "planted/outcome-0.txt").read_text()
    assert not (tmp_path / "plain/outcome-0.txt").exists()
    assert '"resume_loss_change": 0.0' in (tmp_path / "plain/attempts/1/metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_planted_code_does_not_run_in_the_conversion(written, stage, tmp_path):
    memory = MemorySettings(zero_stage=stage)
    for kind in KINDS:
        folder = tmp_path / kind / f"zero-{stage}"
        shutil.copytree(written / f"zero-{stage}", folder)
        parts = Parts(folder, 1)
        [(_, checkpoint)] = checkpoints(parts)
        plant(checkpoint, kind, tmp_path / "ran", new_digests=False)
        with pytest.raises(
            CheckpointDiffers, match=rf"{kind} has \d+ bytes, and \d+ were written.*; remove "
        ):
            convert_last_checkpoint(parts, 1, memory)
        shutil.rmtree(checkpoint)
        shutil.copytree(written / f"zero-{stage}", folder, dirs_exist_ok=True)
        plant(checkpoint, kind, tmp_path / "ran", new_digests=True)
        with pytest.raises(ConversionFailed, match=r"a state file holds more than tensors"):
            convert_last_checkpoint(parts, 1, memory)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_planted_code_does_not_run_from_a_converted_checkpoint(model, written, tmp_path):
    scenarios = []
    for stage in STAGES:
        base = tmp_path / f"converted/zero-{stage}"
        shutil.copytree(written / f"zero-{stage}", base)
        converted = convert_last_checkpoint(Parts(base, 1), 1, MemorySettings(zero_stage=stage))
        assert converted is not None
        kinds = {kind for kind in UNIVERSAL_KINDS for name in state_files(converted) if name.endswith(kind)}
        assert {"fp32.pt", "exp_avg.pt", "model_states.pt"} <= kinds
        for kind in sorted(kinds):
            for digests in ("old", "new"):
                name = f"zero-{stage}-{kind}-{digests}"
                shutil.copytree(base, tmp_path / name)
                copy = tmp_path / name / converted.relative_to(base)
                assert plant(copy, kind, tmp_path / f"ran-{name}", new_digests=digests == "new")
                scenarios.append((name, stage))
    run(model, tmp_path, scenarios, 1)
    assert not list(tmp_path.glob("ran-*"))
    for name, _ in scenarios:
        outcome = (tmp_path / name / "outcome-0.txt").read_text()
        assert outcome.startswith("CheckpointDiffers: ") and "and it is converted again" in outcome, name
