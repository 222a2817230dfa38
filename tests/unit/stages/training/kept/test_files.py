"""Kept vision features: rounding, reading by tile, and the tower they belong to."""

import pytest
import torch

from stages.parts import Parts
from stages.training.kept.files import KeptFiles, tensors_digest
from stages.training.kept.folders import features_folder, kept_bytes_on_disk, remove_half_kept
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.errors import UserError

FEATURES_NPv = torch.randn(7, 4, 32, generator=torch.Generator().manual_seed(0))


def test_features_are_read_by_tile_rounded_to_bfloat16(tmp_path):
    files = KeptFiles(tmp_path / "features", "tower", torch.bfloat16)
    files.write("00000", 7, lambda: iter(FEATURES_NPv.split(3)))
    rounded = FEATURES_NPv.bfloat16()
    assert torch.equal(files.read("00000", slice(2, 6)), rounded[2:6])
    assert torch.equal(files.read("00000", [6, 0, 0]), rounded[[6, 0, 0]])


def test_published_features_are_not_computed_again(tmp_path):
    KeptFiles(tmp_path, "tower", torch.bfloat16).write("00000", 7, lambda: iter([FEATURES_NPv]))

    def never():
        raise AssertionError("computed again")

    files = KeptFiles(tmp_path, "tower", torch.bfloat16)
    files.write("00000", 7, never)
    assert torch.equal(files.read("00000", [1]), FEATURES_NPv[1:2].bfloat16())


def test_features_of_another_tower_are_refused(tmp_path):
    towers = []
    for seed in (0, 1, 0):
        model = make_tiny_model(tmp_path / f"model-{len(towers)}", seed=seed)
        towers.append(tensors_digest(load_model(model).base.model.vision_tower))
    assert towers[0] == towers[2] != towers[1]
    folder = tmp_path / "features"
    KeptFiles(folder, towers[0], torch.float32).write("00000", 7, lambda: iter([FEATURES_NPv]))
    files = KeptFiles(folder, towers[1], torch.float32)
    message = f"weights of the digest {towers[0][:12]}, but this training has {towers[1][:12]}"
    with pytest.raises(UserError, match=message):
        files.read("00000", [0])
    for use in (lambda: files.write("00000", 7, lambda: iter([FEATURES_NPv])), lambda: files.has("00000")):
        with pytest.raises(UserError, match=r"remove .*/features, and it is computed again"):
            use()


def test_what_a_killed_rank_was_writing_is_removed_and_does_not_count_as_kept(tmp_path):
    parts = Parts(tmp_path, 1)
    files = KeptFiles(features_folder(parts), "tower", torch.float32)
    files.write("00000", 7, lambda: iter([FEATURES_NPv]))
    kept_bytes = kept_bytes_on_disk(parts)
    assert FEATURES_NPv.nbytes <= kept_bytes < FEATURES_NPv.nbytes + 1000  # with the header

    def killed():
        yield FEATURES_NPv[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write("00001", 7, killed)
    folder = features_folder(parts)
    assert len(list(folder.iterdir())) == 2 and kept_bytes_on_disk(parts) == kept_bytes
    remove_half_kept(parts)
    assert [path.name for path in folder.iterdir()] == ["00000"] and files.has("00000")
