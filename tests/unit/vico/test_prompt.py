"""Prompts: which tokens are answers, where tiles go, what is refused."""

import pytest

from tests.tiny_model import make_tiny_model
from vico.prompt import PromptFormat, load_prompt_format


@pytest.fixture(scope="module")
def prompt_format(tmp_path_factory):
    return load_prompt_format(make_tiny_model(tmp_path_factory.mktemp("model")))


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_two_turns_with_two_pictures_give_published_chatml(prompt_format):
    skeleton = prompt_format.encode(turns("<image>\nwhat", "this", "<image>and", "that"), [2, 1])
    text = prompt_format.tokenizer.decode(skeleton.ids)
    assert text == (
        "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nwhat<|im_end|>\n"
        "<|im_start|>assistant\nthis<|im_end|>\n"
        "<|im_start|>user\n<img><IMG_CONTEXT></img>and<|im_end|>\n"
        "<|im_start|>assistant\nthat<|im_end|>\n"
    )
    assert skeleton.num_tiles == 3


def test_answers_are_all_assistant_turns_with_their_end_of_turn(prompt_format):
    skeleton = prompt_format.encode(turns("what", "this", "and", "that"), [])
    answers = prompt_format.tokenizer.decode(skeleton.ids[skeleton.answer])
    assert answers == "this<|im_end|>that<|im_end|>"
    assert skeleton.num_answer_tokens == skeleton.answer.sum()
    assert skeleton.num_text_tokens == len(skeleton.ids)


def test_a_generation_prompt_ends_with_the_open_turn(prompt_format):
    skeleton = prompt_format.encode(turns("what"), [], add_generation_prompt=True)
    assert prompt_format.tokenizer.decode(skeleton.ids).endswith("<|im_start|>assistant\n")
    assert not skeleton.answer.any()


def test_a_system_turn_comes_first(prompt_format):
    conversation = [{"from": "system", "value": "short"}, *turns("what", "this")]
    text = prompt_format.tokenizer.decode(prompt_format.encode(conversation, []).ids)
    assert text.startswith("<|im_start|>system\nshort<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize(
    ("conversation", "tiles", "message"),
    [
        (turns("<image><image>", "a"), [1], "more <image> marks than pictures"),
        (turns("<image>", "a"), [1, 1], "1 more pictures than <image> marks"),
        ([{"from": "robot", "value": "a"}], [], "from='robot' is not one of human, gpt, system"),
        (turns("what is <IMG_CONTEXT>", "a"), [], "turn 0: the text spells the token <IMG_CONTEXT>"),
    ],
)
def test_an_invalid_conversation_is_refused(prompt_format, conversation, tiles, message):
    with pytest.raises(ValueError, match=message):
        prompt_format.encode(conversation, tiles)


def test_texts_are_encoded_as_by_the_tokenizer_even_if_its_file_truncates(prompt_format):
    """The Rust tokenizer is called directly; its own settings for length and padding must not apply."""
    texts = ["user\n", "\n", "a <ref>box</ref> and  two spaces", "é, 中文 and \U0001f600", "<|im_end|>"]
    expected = [prompt_format.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert prompt_format._turn_tokenizer.texts_ids(texts) == expected
    prompt_format.tokenizer.backend_tokenizer.enable_truncation(2)
    with_truncation = PromptFormat(prompt_format.tokenizer, prompt_format.settings)
    assert with_truncation._turn_tokenizer.texts_ids(texts) == expected
