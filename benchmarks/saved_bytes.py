"""Bytes that autograd keeps for the backward pass, counted with saved-tensor hooks, next to the memory model.

    python -m benchmarks.saved_bytes --json

Layers have the real widths of InternVL3.5-1B and 8B, in bfloat16 on the CPU; few of them, as bytes grow by
the same amount with each. Counted are `--tiles` tiles in the vision tower and `--tokens` tokens in the
language model, under every policy of `train.memory.activation_checkpointing`; with one that computes layers
again, the count includes what one layer keeps without it, which is in memory while the backward pass is in
that layer. `ratio` is the memory model over the count, for the layers measured; `per_layer` is what one more
layer adds.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.memory.model_sizes import ModelSizes, model_sizes
from vico.memory.training_memory import TrainingShape, saved_language_bytes, saved_vision_bytes
from vico.model.internvl import VicoModel
from vico.model.recomputed import recompute_layers
from vico.model_files import model_config
from vico.packing import TiledSequence, packed_row
from vico.prompt import Skeleton

POLICIES: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "norm_type": "layer_norm",
}
WIDTHS = {  # name -> (vision, text)
    "1B": (
        VISION,
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "8B": (
        VISION,
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
}


def saved_bytes(model: VicoModel, forward: Callable[[], torch.Tensor]) -> int:
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


def kept_by_checkpointing() -> list[Any]:
    """Return the objects with the tensors that selective checkpointing keeps anywhere in this process."""
    return [item for item in gc.get_objects() if type(item) is torch.utils.checkpoint._VersionWrapper]


@dataclass(frozen=True)
class Counted:
    """Bytes of the vision tower and of the language model, counted, and the sizes of the model."""

    vision: int
    language: int
    sizes: ModelSizes


def counted(
    folder: Path,
    widths: tuple[dict[str, Any], dict[str, Any]],
    layers: int,
    shape: TrainingShape,
) -> Counted:
    """Return the bytes that `layers` layers keep for `shape.tiles` tiles and `shape.tokens` tokens, with all
    of them at the answers' end of one sample."""
    vision, text = ({**part, "num_hidden_layers": layers} for part in widths)
    make_tiny_model(folder, tile_size=448, vision=vision | {"norm_type": "layer_norm"}, text=text)
    dtype = torch.bfloat16 if shape.weight_bytes == 2 else torch.float32
    model = load_model(folder, dtype).train()
    model.add_compressed_connector(0)
    recompute_layers(model, shape.checkpointing)
    tokens = shape.tokens
    skeleton = Skeleton(np.full(tokens, 10, np.int64), np.arange(tokens) >= tokens - 32, 0)
    row = packed_row([TiledSequence(skeleton, np.zeros(0, bool), 0)], model.settings)
    none = [torch.zeros(0, count, model.language_width, dtype=dtype) for count in (256, 64)]
    pixels = torch.zeros(shape.tiles, 3, 448, 448)
    return Counted(
        vision=saved_bytes(model, lambda: model.vision_features(pixels)),
        language=saved_bytes(model, lambda: model.answer_hidden_states(row, *none)),
        sizes=model_sizes(model_config(folder)),
    )


def counting_shape(tokens: int, tiles: int, weight_bytes: int = 2) -> TrainingShape:
    """Return a shape for counting saved bytes: what decides only other parts of the memory is arbitrary."""
    return TrainingShape(
        tokens=tokens,
        tiles=tiles,
        num_ranks=1,
        weight_bytes=weight_bytes,
        zero_stage=1,
        offload="none",
        reference="replicated",
        checkpointing="none",
        train_vision=True,
        kl_chunk_rows=1,
    )


def rows_of(name: str, shape: TrainingShape, layers: tuple[int, int]) -> list[dict[str, Any]]:
    """Return the rows of vision tower and language model under every policy: few and more layers counted."""
    rows: list[dict[str, Any]] = []
    plain: dict[str, float] = {}
    for policy in POLICIES:  # plain first
        for row in _rows_of_policy(name, replace(shape, checkpointing=policy), layers, plain):
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def _rows_of_policy(
    name: str, shape: TrainingShape, layers: tuple[int, int], plain: dict[str, float]
) -> list[dict[str, Any]]:
    """Return the rows of one policy; `plain`: part -> bytes of a layer without checkpointing, filled in by
    the policy `none`."""
    with tempfile.TemporaryDirectory() as folder:
        few, many = (counted(Path(folder) / str(count), WIDTHS[name], count, shape) for count in layers)
    rows = []
    for part, unit, units, model_of in (
        ("vision", "tile", shape.tiles, saved_vision_bytes),
        ("language", "token", shape.tokens, saved_language_bytes),
    ):
        first, second = getattr(few, part), getattr(many, part)
        computed, computed_few = model_of(many.sizes, shape), model_of(few.sizes, shape)
        added = layers[1] - layers[0]
        if shape.checkpointing == "none":
            plain[part] = (second - first) / added
        counted_bytes = second + (plain[part] if shape.checkpointing != "none" else 0)
        rows.append(
            {
                "widths": name,
                "part": part,
                "checkpointing": shape.checkpointing,
                "layers": layers[1],
                f"bytes_per_{unit}": counted_bytes / units,
                f"computed_per_{unit}": computed / units,
                "ratio": computed / counted_bytes,
                f"per_layer_and_{unit}": (second - first) / added / units,
                f"computed_per_layer_and_{unit}": (computed - computed_few) / added / units,
                "ratio_per_layer": (computed - computed_few) / (second - first),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--tiles", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs=2, default=(2, 4), help="few and more layers to count")
    parser.add_argument("--widths", choices=list(WIDTHS), action="append", help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.widths or WIDTHS:
        rows += rows_of(name, counting_shape(options.tokens, options.tiles), tuple(options.layers))
    furthest = max(abs(row["ratio"] - 1) for row in rows)
    print(json.dumps({"name": "saved_bytes", "rows": rows, "ratios": {"furthest_from_1": furthest}}))


if __name__ == "__main__":
    main()
