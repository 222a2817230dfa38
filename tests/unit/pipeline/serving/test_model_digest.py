"""Two folders have one digest exactly when they have the same model."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.serving.start.model_digest import model_digest
from vico.checkpoints.tensor_files import tensors_of_file
from vico.errors import UserError

SMALL = Path(__file__).parents[4] / "models" / "small-internvl"


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(SMALL.resolve(), tmp_path / "model"))


def test_a_copy_has_the_same_digest(copy):
    (copy / "README.md").write_text("notes")
    assert model_digest(copy) == model_digest(SMALL)


@pytest.mark.parametrize("end", ["first", "last"])
def test_one_other_tensor_anywhere_is_another_model(copy, end):
    path = copy / "model.safetensors"
    spans = sorted(tensor.spans[0] for tensor in tensors_of_file(path).values())
    with path.open("r+b") as file:
        file.seek(spans[0 if end == "first" else -1][0])
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    assert model_digest(copy) != model_digest(SMALL)


def test_another_config_is_another_model(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"image_token_id_of_another": 1}))
    assert model_digest(copy) != model_digest(SMALL)


def test_weights_that_are_cut_short_are_named(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model.safetensors is not a whole safetensors file"):
        model_digest(copy)
