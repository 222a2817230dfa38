"""Kept vision features: rounding, reading by tile, and the tower they belong to."""

import pytest
import torch

from stages.router.features import FeatureFiles, tower_digest
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.errors import UserError

FEATURES_NPv = torch.randn(7, 4, 32, generator=torch.Generator().manual_seed(0))


def test_features_are_read_by_tile_rounded_to_bfloat16(tmp_path):
    files = FeatureFiles(tmp_path / "features", "tower")
    files.write("00000", 7, lambda: iter(FEATURES_NPv.split(3)))
    rounded = FEATURES_NPv.bfloat16()
    assert torch.equal(files.read("00000", slice(2, 6)), rounded[2:6])
    assert torch.equal(files.read("00000", [6, 0, 0]), rounded[[6, 0, 0]])


def test_published_features_are_not_computed_again(tmp_path):
    FeatureFiles(tmp_path, "tower").write("00000", 7, lambda: iter([FEATURES_NPv]))

    def never():
        raise AssertionError("computed again")

    files = FeatureFiles(tmp_path, "tower")
    files.write("00000", 7, never)
    assert torch.equal(files.read("00000", [1]), FEATURES_NPv[1:2].bfloat16())


def test_features_of_another_tower_are_refused(tmp_path):
    towers = []
    for seed in (0, 1, 0):
        model = make_tiny_model(tmp_path / f"model-{len(towers)}", seed=seed)
        towers.append(tower_digest(load_model(model).base.model.vision_tower))
    assert towers[0] == towers[2] != towers[1]
    folder = tmp_path / "features"
    FeatureFiles(folder, towers[0]).write("00000", 7, lambda: iter([FEATURES_NPv]))
    files = FeatureFiles(folder, towers[1])
    message = f"features of the vision tower {towers[0][:12]}, but the policy has the tower {towers[1][:12]}"
    with pytest.raises(UserError, match=message):
        files.read("00000", [0])
    with pytest.raises(UserError, match=r"remove .*/features, and the features are computed again"):
        files.write("00000", 7, lambda: iter([FEATURES_NPv]))
