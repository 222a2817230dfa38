"""The special tokens of InternVL's ChatML prompts, and the mark of a picture in a conversation's text."""

IMAGE_START, IMAGE_END, IMAGE_TOKEN = "<img>", "</img>", "<IMG_CONTEXT>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE_MARK = "<image>"
TEMPLATE = "chatml-1"
"""Part of the tokenizer's fingerprint; changes when `vico/prompt.py` writes other prompts."""
