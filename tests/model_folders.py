"""Model folders for tests of layouts: with a router, written in a layout, or changed in one way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vico.checkpoints import load_model
from vico.checkpoints.save import save_model

_INTERNLM2_NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}
THRESHOLD = 0.375
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def routed_model(base: Path, folder: Path) -> Path:
    """Write a policy with random connector and router and a threshold, as an export does; return `folder`."""
    model = load_model(base)
    model.add_compressed_connector(1)
    model.add_router(2)
    save_model(model.state_dict(), base, folder, {"absolute_threshold": THRESHOLD})
    return folder


def written_folder(write: Callable[..., None], source: Path, folder: Path, **options: Any) -> Path:
    """Write `source` to the new `folder` with a writer of a layout; return `folder`."""
    folder.mkdir()
    write(source, folder, **options)
    return folder


def changed_copy(folder: Path, copy: Path, change: Change) -> Path:
    """Copy the model folder with `change(config, tensors)` applied; return `copy`."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    tensors = load_file(copy / "model.safetensors")
    change(config, tensors)
    (copy / "config.json").write_text(json.dumps(config))
    save_file(tensors, copy / "model.safetensors")
    return copy


def internlm2_folder(llama: Path, folder: Path) -> Path:
    """Copy a published folder with a Llama as one with the same InternLM2, head by head; return `folder`."""
    return changed_copy(llama, folder, _as_internlm2)


def _as_internlm2(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    text = config["llm_config"]
    text |= {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "attn_implementation": "eager",
    }
    text |= {"bias": text.pop("attention_bias"), "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    text |= {"auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"}}
    for name in ("mlp_bias", "head_dim"):
        del text[name]
    heads, key_heads = text["num_attention_heads"], text["num_key_value_heads"]
    for name in [name for name in tensors if ".self_attn.q_proj." in name]:
        q, k, v = (tensors.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj"))
        width = len(q) // heads
        rows = []
        for key_head in range(key_heads):
            first = key_head * (heads // key_heads)
            rows += [
                q[head * width : (head + 1) * width] for head in range(first, first + heads // key_heads)
            ]
            rows += [part[key_head * width : (key_head + 1) * width] for part in (k, v)]
        tensors[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(rows)
    for name in [name for name in tensors if name.startswith("language_model.")]:
        for ours, theirs in _INTERNLM2_NAMES.items():
            if ours in name:
                tensors[name.replace(ours, theirs)] = tensors.pop(name)
