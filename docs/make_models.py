"""Write docs/models.md: which checkpoints are trained or refused, with sizes and GPUs, from the code itself.

`python docs/make_models.py` writes the page; `--check` exits with 1 if it is out of date. Whether a model is
accepted, and the reason if not, is what `vico.published_config` says of its config; memory is
`vico/memory/training_memory.py`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from pipeline.planning.setups import MOST_GPUS, smallest_setup
from vico.errors import UserError
from vico.memory.model_sizes import ModelSizes, model_sizes
from vico.published_config import SUPPORTED, TEMPLATE_NAME, hf_config

PAGE = Path(__file__).with_name("models.md")
HEAD = """# Models

Which InternVL checkpoints `vico` trains, and what they need. This page is generated from the code by
`make docs`. `vico init my.yaml --model MODEL` checks one checkpoint in the same way, from its `config.json`
alone. It prints a site file for the smallest number of GPUs, and writes a pipeline file with packs, learning
rate and dtype for the model.

A checkpoint is trained if its language model is one of {supported},
in the published layout (InternVLChatModel, also with Flash's connector and router) or the Hugging Face
layout (`-HF`). A checkpoint with another language model is refused by its config, before any weight is
read. A checkpoint whose config.json has another `template` than `{template}` is refused, too: the prompt of
InternVL2, for example, has no line break between turns. To train such a model (InternVL2-Llama3-76B is one)
with the later prompt, set its `template` to `{template}`.

`GPUs` is the smallest number of 80 GB GPUs on which the consistency stage fits in bfloat16 with the
whole model trained, by the memory model of `vico plan` (90 % of the memory is used); more GPUs are
faster. `memory` is that of one of these GPUs at a full pack; `host` is the host memory of its rank beside
the pictures ([training.md](training.md#budgets-and-learning-rate)). **These numbers are computed, not
measured**: no published size was trained yet ([README](../README.md#what-is-tested-where)).
"""
FOOT = """
`ZeRO 3` here also spreads the reference (`train.memory.reference: sharded`). `pack` is
`consistency.tiles_per_pack` and `consistency.reference_tokens_per_pack`; a smaller pack needs more
packs per step for the same update. With ZeRO 2 each rank first reads policy and reference into host
memory; with ZeRO 3 and a sharded reference it reads only its part. At the end rank 0 gathers the policy
in host memory to write it: 2 bytes per parameter.

The table is about training. `ratio` and `evaluate` keep policy and reference whole on one GPU, which takes
{whole} in bfloat16. With `resources.gpu_memory_gb` in the site,
`vico plan`, `vico run` and `vico submit` refuse GPUs that are too small for that; `--until consistency`
ends the run before `ratio`.

## InternLM2 and InternLM3

Both are Llamas under other names. `vico` opens them as Llamas, as the Hugging Face conversions do
(InternVL2_5-2B-MPO-hf), and an export in the published layout has the base's own tensor names again:

| InternLM2, below `language_model.` | Llama |
|---|---|
| `model.tok_embeddings`, `output` | `model.embed_tokens`, `lm_head` |
| `attention_norm`, `ffn_norm` | `input_layernorm`, `post_attention_layernorm` |
| `attention.wo` | `self_attn.o_proj` |
| `feed_forward.w1`, `w3`, `w2` | `mlp.gate_proj`, `up_proj`, `down_proj` |
| `attention.wqkv` | `self_attn.q_proj`, `k_proj`, `v_proj` |

The rows of `attention.wqkv` are, for each key head in turn, those of the query heads that share it, then
those of the key, then those of the value.

`bias` of InternLM2 is `attention_bias` of Llama. InternLM3 has Llama's tensors; its `qkv_bias` and `bias`
must be equal. Refused: a `rope_pos_id_version` other than `default` (V2PE).

- **Tokenizer.** Published InternLM folders have a SentencePiece `tokenizer.model` and Python code for it,
  which `vico` does not run. Copy `tokenizer.json` and `tokenizer_config.json` of the same model's Hugging
  Face conversion over them; without them, the shard stage stops and says so.
- **BOS.** Prompts begin with the BOS token if the tokenizer begins its texts with one, as in InternVL's code.
- **Long samples.** With `rope_scaling` of type `dynamic` or `longrope`, positions beyond
  `max_position_embeddings` change the frequencies of the whole batch, so that samples of a pack would
  depend on each other. The shard stage refuses a `shard.max_tokens` above it; up to it, `dynamic` changes
  nothing.

Tested with parity cases against the published equations, at small widths: Llama, InternLM2, InternLM3,
Qwen2, Qwen3 and Qwen3-MoE language models, both vision towers' norms, both layouts, Flash. No published
InternLM or Llama checkpoint was opened yet.
"""
VIT = {
    "300M": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "norm_type": "layer_norm",
        "qkv_bias": True,
        "qk_normalization": False,
    },
    "6B": {
        "hidden_size": 3200,
        "intermediate_size": 12800,
        "num_hidden_layers": 45,
        "num_attention_heads": 25,
        "norm_type": "rms_norm",
        "qkv_bias": False,
        "qk_normalization": True,
    },
}
# language model -> (width, width of the MLP, layers, heads, heads of keys); Qwen3 has heads of 128
QWEN2 = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4),
    "Qwen2.5-14B": (5120, 13824, 48, 40, 8),
    "Qwen2.5-32B": (5120, 27648, 64, 40, 8),
    "Qwen2.5-72B": (8192, 29568, 80, 64, 8),
}
QWEN3 = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8),
    "Qwen3-4B": (2560, 9728, 36, 32, 8),
    "Qwen3-8B": (4096, 12288, 36, 32, 8),
    "Qwen3-14B": (5120, 17408, 40, 40, 8),
    "Qwen3-32B": (5120, 25600, 64, 64, 8),
}
MOE = {  # and (experts, experts of a token, width of an expert)
    "Qwen3-30B-A3B": (2048, 6144, 48, 32, 4, 128, 8, 768),
    "Qwen3-235B-A22B": (4096, 12288, 94, 64, 4, 128, 8, 1536),
}
INTERNLM = {
    "InternLM2.5-1.8B": (2048, 8192, 24, 16, 8),
    "InternLM2.5-7B": (4096, 14336, 32, 32, 8),
    "InternLM2.5-20B": (6144, 16384, 48, 48, 8),
    "InternLM3-8B": (4096, 10240, 48, 32, 2),
}
OTHERS = {"GPT-OSS-20B": "GptOssForCausalLM"}
FAMILIES = {
    "InternVL2.5": (
        ("1B", "300M", "Qwen2.5-0.5B"),
        ("2B", "300M", "InternLM2.5-1.8B"),
        ("4B", "300M", "Qwen2.5-3B"),
        ("8B", "300M", "InternLM2.5-7B"),
        ("26B", "6B", "InternLM2.5-20B"),
        ("38B", "6B", "Qwen2.5-32B"),
        ("78B", "6B", "Qwen2.5-72B"),
    ),
    "InternVL3": (
        ("1B", "300M", "Qwen2.5-0.5B"),
        ("2B", "300M", "Qwen2.5-1.5B"),
        ("8B", "300M", "Qwen2.5-7B"),
        ("9B", "300M", "InternLM3-8B"),
        ("14B", "300M", "Qwen2.5-14B"),
        ("38B", "6B", "Qwen2.5-32B"),
        ("78B", "6B", "Qwen2.5-72B"),
    ),
    "InternVL3.5, also Flash": (
        ("1B", "300M", "Qwen3-0.6B"),
        ("2B", "300M", "Qwen3-1.7B"),
        ("4B", "300M", "Qwen3-4B"),
        ("8B", "300M", "Qwen3-8B"),
        ("14B", "300M", "Qwen3-14B"),
        ("38B", "6B", "Qwen3-32B"),
        ("20B-A4B preview", "300M", "GPT-OSS-20B"),
        ("30B-A3B", "300M", "Qwen3-30B-A3B"),
        ("241B-A28B", "6B", "Qwen3-235B-A22B"),
    ),
}


def _of_kind(language: str) -> dict[str, Any]:
    """Return the architecture of a language model and what all of its sizes have."""
    if language in QWEN2:
        return {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 151674}
    if language in INTERNLM:
        kind, vocabulary = ("InternLM3", 128521) if language.startswith("InternLM3") else ("InternLM2", 92553)
        architecture = {"architectures": [f"{kind}ForCausalLM"], "vocab_size": vocabulary}
        return {**architecture, "rms_norm_eps": 1e-5, "bias": False}
    return {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128}


def published(vision: str, language: str) -> dict[str, Any]:
    """Return what decides about a checkpoint, as its published config.json has it."""
    if language in OTHERS:
        text: dict[str, Any] = {"architectures": [OTHERS[language]]}
    else:
        width, mlp, layers, heads, keys, *experts = {**QWEN2, **QWEN3, **MOE, **INTERNLM}[language]
        text = {
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": keys,
            **_of_kind(language),
        }
        if experts:
            names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
            text |= {"architectures": ["Qwen3MoeForCausalLM"], **dict(zip(names, experts, strict=True))}
    return {"vision_config": {**VIT[vision], "image_size": 448, "patch_size": 14}, "llm_config": text}


def row(size: str, vision: str, language: str) -> str:
    """Return the line of a checkpoint in the table of its family."""
    try:
        config = hf_config(published(vision, language), None, "config.json")
    except UserError as error:
        reason = str(error).partition(": ")[2].partition(";")[0]
        return f"| {size} | {language} | refused: {reason} | | | | | |"
    sizes = model_sizes(config)
    setup = smallest_setup(sizes)
    parameters = f"{sizes.base / 1e9:.1f}B"
    if setup is None:
        return f"| {size} | {language} | trained | {parameters} | more than {MOST_GPUS} | | | |"
    recomputed = "" if setup.checkpointing == "none" else f", {setup.checkpointing} checkpointing"
    how = f"ZeRO {setup.zero_stage}{recomputed}"
    pack = f"{setup.tiles_per_pack} tiles, {setup.tokens_per_pack:,} tokens"
    memory, host = (f"{value / 1e9:.0f} GB" for value in (setup.memory.device, setup.memory.host))
    cells = (size, language, "trained", parameters, f"{setup.num_gpus}: {how}", pack, memory, host)
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """Return the whole page as Markdown."""
    supported = ", ".join(sorted(name.removesuffix("ForCausalLM") for name in SUPPORTED))
    head = HEAD.format(supported=supported, template=TEMPLATE_NAME)
    tables = []
    for family, checkpoints in FAMILIES.items():
        lines = [f"## {family}\n", "| size | language model | | parameters | GPUs | pack | memory | host |"]
        lines += ["|---|---|---|---:|---|---|---:|---:|", *(row(*checkpoint) for checkpoint in checkpoints)]
        tables.append("\n".join(lines))
    examples = {"InternVL3.5-8B": ("300M", "Qwen3-8B"), "30B-A3B": ("300M", "Qwen3-30B-A3B")}
    whole = ", ".join(
        f"{_both_gb(model_sizes(hf_config(published(*parts), None, ''))):.0f} GB for {name}"
        for name, parts in examples.items()
    )
    return head + "\n" + "\n\n".join(tables) + "\n" + FOOT.format(whole=whole)


def _both_gb(sizes: ModelSizes) -> float:
    """Return the gigabytes of policy and reference in bfloat16."""
    return 2 * (sizes.policy + sizes.base) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say whether the page is up to date")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE.name} is out of date; run: make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
