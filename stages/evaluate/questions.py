"""The question that the evaluation asks of a conversation."""

from collections.abc import Sequence
from dataclasses import dataclass

from vico.prompt import PromptFormat, Skeleton, is_learned
from vico.special_tokens import IMAGE_MARK
from vico.turn_tokenizer import Turn


@dataclass(frozen=True)
class Question:
    """The text of a question, its expected answer, and the prompt with all earlier turns as history."""

    text: str
    answer: str
    prompt: Skeleton


def last_question(
    turns: Sequence[Turn], tiles_per_image: Sequence[int], prompt_format: PromptFormat
) -> Question:
    """Return the last question of a conversation that has an answer to learn."""
    last = max(n for n, turn in enumerate(turns) if is_learned(turn))
    history = turns[:last]
    questions = [turn["value"] for turn in history if turn["from"] == "human"]
    # as `encode` counts them: a system turn may show images too
    num_images = sum(turn["value"].count(IMAGE_MARK) for turn in history if turn["from"] != "gpt")
    prompt = prompt_format.encode(history, tiles_per_image[:num_images], add_generation_prompt=True)
    text = questions[-1].replace(IMAGE_MARK, "").strip() if questions else ""
    return Question(text, turns[last]["value"], prompt)
