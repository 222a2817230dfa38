"""InternLM2's tensors under Llama's names and back: one architecture, but InternLM2 joins q, k and v.

The rows of `attention.wqkv` are, for each key head in turn, those of the query heads that share it, then
those of the key, then those of the value (InternLM's modeling_internlm2.py). All names here are those of the
published layout.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from vico.checkpoints.layouts import Splittable, renamed
from vico.checkpoints.tensor_files import StoredTensor

T = TypeVar("T", bound=Splittable)
HEAD = "language_model.output.weight"
_MODEL, _LAYER = "language_model.model.", "language_model.model.layers.#."
_NAMES = (  # (Llama, InternLM2); `#` is the number of a layer
    (f"{_MODEL}embed_tokens.", f"{_MODEL}tok_embeddings."),
    (f"{_LAYER}self_attn.o_proj.", f"{_LAYER}attention.wo."),
    (f"{_LAYER}input_layernorm.", f"{_LAYER}attention_norm."),
    (f"{_LAYER}post_attention_layernorm.", f"{_LAYER}ffn_norm."),
    (f"{_LAYER}mlp.gate_proj.", f"{_LAYER}feed_forward.w1."),
    (f"{_LAYER}mlp.down_proj.", f"{_LAYER}feed_forward.w2."),
    (f"{_LAYER}mlp.up_proj.", f"{_LAYER}feed_forward.w3."),
    ("language_model.lm_head.", "language_model.output."),
)
_WQKV = re.compile(r"(language_model\.model\.layers\.\d+\.)attention\.wqkv\.(weight|bias)$")
_SPLIT = re.compile(r"(language_model\.model\.layers\.\d+\.)self_attn\.([qkv])_proj\.(weight|bias)$")


def _is_internlm2(names: Iterable[str]) -> bool:
    return any(_WQKV.match(name) for name in names)


def llama_tensors(
    tensors: Mapping[str, T], text: Mapping[str, Any], join: Callable[[Sequence[T]], T]
) -> dict[str, T]:
    """Return published tensors with those of an InternLM2 by Llama's names, and all others as they are.

    `text` is the text config; `join` joins pieces along their first axis.
    """
    if not _is_internlm2(tensors):
        return dict(tensors)
    key_heads = text["num_key_value_heads"]
    shared = text["num_attention_heads"] // key_heads
    named: dict[str, T] = {}
    for name, tensor in tensors.items():
        fused = _WQKV.match(name)
        if not fused:
            named[renamed(name, _NAMES, to_ours=True)] = tensor
            continue
        groups = [group.chunk(shared + 2) for group in tensor.chunk(key_heads)]
        parts = {
            "q": [piece for group in groups for piece in group[:shared]],
            "k": [group[shared] for group in groups],
            "v": [group[shared + 1] for group in groups],
        }
        named |= {f"{fused[1]}self_attn.{part}_proj.{fused[2]}": join(of) for part, of in parts.items()}
    return named


def internlm2_tensors(
    tensors: Mapping[str, tuple[StoredTensor, ...]], text: Mapping[str, Any]
) -> dict[str, tuple[StoredTensor, ...]]:
    """Return published tensors of a Llama by InternLM2's names; the parts of a tensor are joined in order."""
    key_heads = text["num_key_value_heads"]
    named: dict[str, tuple[StoredTensor, ...]] = {}
    for name, parts in tensors.items():
        split = _SPLIT.match(name)
        if not split:
            named[renamed(name, _NAMES, to_ours=False)] = parts
        elif split[2] == "q":
            of_layer = [tensors[f"{split[1]}self_attn.{part}_proj.{split[3]}"] for part in "qkv"]
            groups = zip(*(tensor.chunk(key_heads) for (tensor,) in of_layer), strict=True)
            named[f"{split[1]}attention.wqkv.{split[3]}"] = tuple(
                piece for group in groups for piece in group
            )
    return named
