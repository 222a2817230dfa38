"""The memory model's activations are the bytes that autograd keeps, counted with saved-tensor hooks."""

import gc

import numpy as np
import pytest
import torch

from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.memory.model_sizes import model_sizes
from vico.memory.training_memory import TrainingShape, saved_language_bytes, saved_vision_bytes
from vico.model.recomputed import recompute_layers
from vico.model_files import model_config
from vico.packing import TiledSequence, packed_row
from vico.prompt import Skeleton

TOKENS, TILES = 256, 2
WIDTHS = {  # (vision, text) in the proportions of a published model, and in others
    "published": (
        {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4},
        {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
    ),
    "other": (
        {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 4},
        {
            "hidden_size": 192,
            "intermediate_size": 1000,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 48,
        },
    ),
}


def saved_bytes(model, forward) -> int:
    """Return the bytes of the storages that autograd keeps, without those of the model itself.

    Selective checkpointing keeps tensors in Python objects, in the graph of the result.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    before = kept_by_checkpointing()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    for wrapper in kept_by_checkpointing():
        if id(wrapper) not in map(id, before):
            keep(wrapper.val)
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def kept_by_checkpointing() -> list[torch.utils.checkpoint._VersionWrapper]:
    """Return the objects with the tensors that selective checkpointing keeps anywhere in this process."""
    return [item for item in gc.get_objects() if type(item) is torch.utils.checkpoint._VersionWrapper]


def counted(folder, widths, layers: int, dtype: torch.dtype, *, checkpointing: str) -> tuple[int, int]:
    """Return (bytes of the vision tower, of the language model) for TILES tiles and TOKENS tokens."""
    vision, text = ({**part, "num_hidden_layers": layers} for part in widths)
    make_tiny_model(folder, tile_size=448, vision=vision | {"norm_type": "layer_norm"}, text=text)
    model = load_model(folder, dtype).train()
    model.add_compressed_connector(0)
    recompute_layers(model, checkpointing)
    pixels = torch.zeros(TILES, 3, 448, 448)
    skeleton = Skeleton(np.full(TOKENS, 10, np.int64), np.arange(TOKENS) >= TOKENS - 32, 0)
    row = packed_row([TiledSequence(skeleton, np.zeros(0, bool), 0)], model.settings)
    width = model.language_width
    tokens = [torch.zeros(0, count, width, dtype=dtype) for count in (256, 64)]
    return (
        saved_bytes(model, lambda: model.vision_features(pixels)),
        saved_bytes(model, lambda: model.answer_hidden_states(row, *tokens)),
    )


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", WIDTHS)
def test_a_layer_keeps_what_the_model_of_memory_says(tmp_path, widths, dtype, checkpointing):
    few, many = (
        counted(tmp_path / str(layers), WIDTHS[widths], layers, dtype, checkpointing=checkpointing)
        for layers in (1, 3)
    )
    shape = TrainingShape(
        tokens=TOKENS,
        tiles=TILES,
        num_ranks=1,
        weight_bytes=dtype.itemsize,
        zero_stage=1,
        offload="none",
        reference="replicated",
        checkpointing=checkpointing,
        train_vision=True,
        kl_chunk_rows=1,
    )
    sizes = [model_sizes(model_config(tmp_path / str(layers))) for layers in (1, 3)]
    expected_vision, expected_language = (
        saved(sizes[1], shape) - saved(sizes[0], shape)
        for saved in (saved_vision_bytes, saved_language_bytes)
    )
    assert many[0] - few[0] == pytest.approx(expected_vision, rel=0.02)
    assert many[1] - few[1] == pytest.approx(expected_language, rel=0.02)
