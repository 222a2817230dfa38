"""The question that the evaluation asks of a conversation."""

import pytest

from stages.evaluate.questions import last_question
from tests.tiny_model import make_tiny_model
from vico.prompt import load_prompt_format


@pytest.fixture(scope="module")
def prompt_format(tmp_path_factory):
    return load_prompt_format(make_tiny_model(tmp_path_factory.mktemp("model") / "m"))


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


@pytest.mark.parametrize(
    "turns, tiles",
    [
        ([human("<image>\nwhat is this?"), gpt("a tile")], (3,)),
        ([human("what?"), gpt("text")], ()),
        ([human("<image>\nwhat?"), gpt("one"), human("<image> and this?"), gpt("two")], (1, 3)),
        ([{"from": "system", "value": "be brief"}, human("a<image>b<image>"), gpt("x"), gpt("y")], (1, 1)),
        ([{"from": "system", "value": "as here: <image>"}, human("<image>\nwhat?"), gpt("x")], (2, 1)),
    ],
)
def test_the_prompt_is_the_training_text_up_to_its_last_answer(prompt_format, turns, tiles):
    """Otherwise the model would get another form of prompt than in training."""
    question = last_question(turns, tiles, prompt_format)
    skeleton = prompt_format.encode(turns, tiles)
    answer = prompt_format.tokenizer(turns[-1]["value"], add_special_tokens=False)["input_ids"]
    length = len(question.prompt.ids)
    assert question.prompt.ids.tolist() == skeleton.ids[:length].tolist()
    assert skeleton.ids[length : length + len(answer) + 1].tolist() == [*answer, prompt_format.end_of_turn_id]
    assert skeleton.answer[length] and not skeleton.answer[length - 1]
    assert question.answer == turns[-1]["value"]


def test_turns_after_the_last_answer_are_left_out(prompt_format):
    turns = [human("<image> what?"), gpt("one"), human("<image> and this?")]
    question = last_question(turns, (3, 5), prompt_format)
    assert question.answer == "one" and question.text == "what?" and question.prompt.num_tiles == 3


def test_only_an_answer_that_is_learned_is_asked_for(prompt_format):
    shown = {**gpt("two"), "loss": False}
    last = last_question([human("<image> what?"), gpt("one"), human("and?"), shown], (3,), prompt_format)
    assert (last.text, last.answer) == ("what?", "one")
    first = last_question([human("<image> what?"), shown, human("and?"), gpt("one")], (3,), prompt_format)
    assert (first.text, first.answer) == ("and?", "one")
    text = prompt_format.tokenizer.decode(first.prompt.ids)
    assert "two<|im_end|>" in text, "the other answer is part of the history"
