"""A tokenizer like Qwen's for tests: line breaks merge, and InternVL's tokens are added to it."""

import json
from collections.abc import Sequence

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<ref>",
    "</ref>",
    "[SEP]",
]
NOT_SPECIAL = ["<|fim_prefix|>", "<think>", "<tool_call>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# of Qwen2's tokenizer.json
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEXT = (
    "user assistant system\n\n\nwhat is written here? \n\n\n\nfour\n\n\n\n\n\n\n\nlines\r\n\r\n"
    "of \n \n text.\n\n\n"
)


def newline_tokenizer(
    added: tuple[str, ...] = (),
    trim_offsets: bool = False,
    normalizer: normalizers.Normalizer | None = None,
    in_vocabulary: bool = False,
    merged: bool = False,
    bos: bool = False,
    **of_special: bool,
) -> PreTrainedTokenizerFast:
    """Return the tokenizer; `added` are more tokens of its own, which are not special.

    `in_vocabulary`: the model itself knows the special tokens, too; `merged`: it even makes them of their
    characters. `bos`: every text begins with `[BOS]`, as with Llama's tokenizers. `of_special` are options
    of the special tokens, such as `rstrip`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer or normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=SPECIAL if in_vocabulary else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 9, trainer)
    if merged:
        tokenizer = _with_merges(tokenizer, SPECIAL)
    options = {"normalized": False, **of_special}
    tokenizer.add_special_tokens([AddedToken(token, special=True, **options) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (*NOT_SPECIAL, *added)])
    assert tokenizer.token_to_id("ĊĊĊ")
    if bos:
        _begin_texts_with(tokenizer, AddedToken("[BOS]", special=True, **options))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[BOS]" if bos else None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def _begin_texts_with(tokenizer: Tokenizer, token: AddedToken) -> None:
    tokenizer.add_special_tokens([token])
    special = [(token.content, tokenizer.token_to_id(token.content))]
    begins = processors.TemplateProcessing(single=f"{token.content} $A", special_tokens=special)
    tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, begins])


def _with_merges(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """Return the tokenizer with merges that make each of the tokens from left to right."""
    state = json.loads(tokenizer.to_str())
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    for token in tokens:
        for end in range(2, len(token) + 1):
            if token[:end] not in vocabulary:
                vocabulary[token[:end]] = len(vocabulary)
                merges.append([token[: end - 1], token[end - 1]])
    return Tokenizer.from_str(json.dumps(state))
