"""Make the untrained small InternVL in HF layout: config, tokenizer, image settings and random weights.

python examples/small_internvl/make_model.py /tmp/small-internvl/start
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import InternVLConfig, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<IMG_CONTEXT>
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def question_words(num_records: int = 4000, min_count: int = 40) -> list[str]:
    """Return the words, with their leading space, that are frequent in the demo's questions."""
    from data_prep.demo.records import demo_record

    counts: Counter[str] = Counter()
    for line in range(num_records):
        row, _ = demo_record(0, line)
        for turn in row["conversations"]:
            if turn["from"] == "human":
                counts.update(re.findall(r" ?[A-Za-z]+", turn["value"].removeprefix("<image>")))
    return sorted(word for word, count in counts.items() if count >= min_count and len(word.strip()) > 1)


def make_tokenizer(words: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer that merges only the beginnings of `words`.

    All other bytes are single tokens, digits and the letters of answers included, so that the model can spell
    words that it never saw in training.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    merges: list[tuple[str, str]] = []
    for word in words:
        word = word.replace(" ", "Ġ")
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    # The names of the two speakers are one token each, because every turn begins with one.
    tokenizer.add_tokens(
        [AddedToken(name, single_word=True, normalized=False) for name in ("user", "assistant")]
    )
    return tokenizer


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write the tokenizer to `folder`; return it as a tokenizer of transformers."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(question_words()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def make_config(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> InternVLConfig:
    """Return the InternVL config for the sizes in `args`; the vocabulary size is a multiple of 8."""
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen3Config

    vision = InternVLVisionConfig(
        hidden_size=args.vision_width,
        num_hidden_layers=args.vision_layers,
        num_attention_heads=args.vision_heads,
        intermediate_size=4 * args.vision_width,
        image_size=[args.tile_size, args.tile_size],
        patch_size=[args.patch_size, args.patch_size],
        attention_bias=True,
        layer_scale_init_value=1.0,
        initializer_range=0.05,
    )
    text = Qwen3Config(
        vocab_size=(len(tokenizer) + 7) // 8 * 8,
        hidden_size=args.text_width,
        intermediate_size=args.text_hidden,
        num_hidden_layers=args.text_layers,
        num_attention_heads=args.text_heads,
        num_key_value_heads=args.text_heads // 2,
        head_dim=args.text_width // args.text_heads,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(args.tile_size // args.patch_size // 2) ** 2,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
        dtype="float32",
    )


def processor_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of GotOcr2ImageProcessor, which InternVL checkpoints in HF layout use."""
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "max_patches": args.max_tiles,
        "min_patches": 1,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": args.tile_size, "width": args.tile_size},
    }


def sine_positions(side: int, width: int) -> torch.Tensor:
    """Return [side * side, width] sines and cosines of row and column, which make neighbours similar."""
    import torch

    rates = torch.pi / 2 ** torch.linspace(0, 4, width // 4)
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return 0.5 * torch.cat([rows, columns], dim=-1).flatten(0, 1)


def make_model(folder: Path, args: argparse.Namespace) -> int:
    """Write the untrained model folder; return its number of parameters."""
    import torch
    from transformers import GenerationConfig, InternVLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(args.seed)
    model = InternVLForConditionalGeneration(make_config(tokenizer, args))
    positions = model.model.vision_tower.embeddings.position_embeddings
    positions.data[0, 1:] = sine_positions(args.tile_size // args.patch_size, args.vision_width)
    eos, pad = model.config.text_config.eos_token_id, model.config.text_config.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, max_new_tokens=64)
    model.save_pretrained(str(folder))
    text = json.dumps(processor_settings(args), indent=2)
    (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")
    return sum(parameter.numel() for parameter in model.parameters())


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--tile-size", type=int, default=112)
    options.add_argument("--patch-size", type=int, default=14)
    options.add_argument("--max-tiles", type=int, default=4, help="without the thumbnail")
    options.add_argument("--vision-width", type=int, default=192)
    options.add_argument("--vision-layers", type=int, default=5)
    options.add_argument("--vision-heads", type=int, default=6)
    options.add_argument("--text-width", type=int, default=192)
    options.add_argument("--text-hidden", type=int, default=512)
    options.add_argument("--text-layers", type=int, default=4)
    options.add_argument("--text-heads", type=int, default=6)
    options.add_argument("--seed", type=int, default=0)
    return options


if __name__ == "__main__":
    arguments = parser().parse_args()
    print(f"{make_model(arguments.folder, arguments):,} parameters in {arguments.folder}")
