"""The special tokens of InternVL's ChatML prompts, and the mark of a picture in a conversation's text."""

IMAGE_START, IMAGE_END, IMAGE_TOKEN = "<img>", "</img>", "<IMG_CONTEXT>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
PROMPT_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_TOKEN, TURN_START, TURN_END)
IMAGE_MARK = "<image>"
CONTENT_TOKENS = frozenset(
    f"<{slash}{name}>" for name in ("ref", "box", "quad", "think") for slash in ("", "/")
)
"""Tokens that texts may spell, although InternVL's tokenizers call most of them special: grounding, thoughts.
"""
TEMPLATE = "chatml-2"
"""Part of the tokenizer's fingerprint; changes when `vico/prompt.py` writes other prompts."""
