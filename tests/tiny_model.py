"""A random InternVL of about 10^5 parameters in HF layout, for tests: any tile size, tied or untied head."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "<IMG_CONTEXT>", "</img>"]
VOCABULARY = 320
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": [14, 14],
    "attention_bias": True,
}
TEXT = {
    "model_type": "qwen3",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
}


def make_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    tile_size: int = 56,
    tied: bool = True,
    vision: Mapping[str, Any] = MappingProxyType({}),
    text: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write the model folder and return it; `vision` and `text` change fields of the two configs.

    Patches have 14 px, so a tile of 56 px has 4 tokens at the full rate and 1 compressed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(str(folder))
    image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config={**VISION, "image_size": [tile_size, tile_size], **vision},
            text_config={**TEXT, "tie_word_embeddings": tied, **text},
            image_token_id=image_token_id,
            image_seq_length=(tile_size // 28) ** 2,
            tie_word_embeddings=tied,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(str(folder))
    processor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 12,
        "size": {"height": tile_size, "width": tile_size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is written here user assistant system"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
