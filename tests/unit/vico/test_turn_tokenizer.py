"""Control tokens are looked for in texts where that is exact, else in ids: both give the same prompts."""

import dataclasses
import itertools
import random

import pytest
from tokenizers import normalizers
from tokenizers.models import BPE

from tests.newline_tokenizer import newline_tokenizer
from tests.tiny_model import make_tiny_model
from vico.prompt import PromptFormat
from vico.settings import ModelSettings, load_settings
from vico.turn_tokenizer import SpelledToken, _never_made

EXACT = {
    "NFC": {},
    "NFKC": {"normalizer": normalizers.NFKC()},
    "lower case": {"normalizer": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])},
    "tokens in the vocabulary": {"in_vocabulary": True},
}
ONLY_IDS_TELL = {
    "normalized tokens": {"normalizer": normalizers.NFKC(), "normalized": True},
    "tokens that take spaces": {"lstrip": True, "rstrip": True},
    "tokens that the model makes": {"merged": True},
    "tokens over the role line": {"added": ("user\n\n", "assistant\n\n")},
    "tokens over the end of the value": {"added": ("x<", "a<|im")},
}
SPELLED = ["<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "[SEP]", "<|fim_prefix|>"]
PIECES = ["<|im_", "end|>", "<", ">", "|", "/", "<im", "img>", "[SE", "P]", "<ima", "ge>", "<image>", "<ref>"]
PIECES += ["four", "x", "q", "a", "user", "assistant", "\uff1c|im_end|\uff1e", "<|IM_END|>"]
PIECES += ["\u00e9", "e\u0301", "\u0301", "\ufb01", "\u4e2d"]
SPACES = [" ", "  ", "\n", "\n\n", "\n\n\n", "\r\n", "\t", "\u3000", "\u00a0", "\u200b"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> ModelSettings:
    return load_settings(make_tiny_model(tmp_path_factory.mktemp("model")))


def format_of(options, settings: ModelSettings) -> PromptFormat:
    tokenizer = newline_tokenizer(**options)
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return PromptFormat(tokenizer, dataclasses.replace(settings, image_token_id=image))


def conversations(count: int):
    """Yield conversations of random pieces, half of them with control tokens, and their numbers of tiles."""
    rng = random.Random(0)
    for number in range(count):
        pieces = [*PIECES, *SPACES, *(SPELLED if number % 2 else [])]
        conversation = [
            {"from": rng.choice(("human", "gpt", "system")), "value": "".join(rng.choices(pieces, k=length))}
            for length in rng.choices(range(7), k=rng.randint(1, 3))
        ]
        shown = [turn["value"].count("<image>") for turn in conversation if turn["from"] != "gpt"]
        yield conversation, rng.choices(range(1, 4), k=sum(shown))


def prompt_of(prompt_format: PromptFormat, conversation, tiles):
    try:
        skeleton = prompt_format.encode(conversation, tiles)
    except SpelledToken as error:
        return str(error)
    assert prompt_format.num_tokens(conversation, tiles) == (
        skeleton.num_text_tokens,
        skeleton.num_answer_tokens,
    )
    return skeleton.ids.tolist(), skeleton.answer.tolist()


@pytest.mark.parametrize("kind", EXACT)
def test_a_search_in_texts_gives_what_the_ids_give(kind, settings):
    quick, slow = format_of(EXACT[kind], settings), format_of(EXACT[kind], settings)
    assert quick._turn_tokenizer._search is not None
    slow._turn_tokenizer._search = None
    num_refused = 0
    for conversation, tiles in conversations(1500):
        prompt = prompt_of(slow, conversation, tiles)
        assert prompt_of(quick, conversation, tiles) == prompt, conversation
        num_refused += isinstance(prompt, str)
    assert 300 < num_refused < 1000


@pytest.mark.parametrize("kind", ONLY_IDS_TELL)
def test_ids_tell_where_a_text_does_not(kind, settings):
    prompt_format = format_of(ONLY_IDS_TELL[kind], settings)
    assert prompt_format._turn_tokenizer._search is None
    tokenizer, control = prompt_format.tokenizer, set(prompt_format.control_tokens)
    for conversation, tiles in conversations(300):
        prompt = prompt_of(prompt_format, conversation, tiles)
        if isinstance(prompt, str):
            continue
        tokens = [token for token in tokenizer.convert_ids_to_tokens(prompt[0]) if token in control]
        assert tokens.count("<|im_start|>") == tokens.count("<|im_end|>") == len(conversation)
        assert tokens.count("<img>") == len(tiles) and tokens.count("<IMG_CONTEXT>") == sum(tiles)
        assert not {"[SEP]", "<|fim_prefix|>"}.intersection(tokens)


@pytest.mark.parametrize("seed", range(40))
def test_a_token_of_the_vocabulary_is_never_made_if_no_text_makes_it(seed):
    """Compare with all texts of up to seven characters."""
    rng = random.Random(seed)
    made, merges = list("abc"), []
    while len(made) < 12:
        left, right = rng.choice(made), rng.choice(made)
        if len(left + right) <= 5 and left + right not in made:
            made.append(left + right)
            merges.append((left, right))
    others = {"".join(rng.choices("abc", k=rng.randint(2, 5))) for _ in range(12)}.difference(made)
    vocabulary = {token: n for n, token in enumerate([*made, *sorted(others)])}
    model = BPE(vocabulary, merges)
    texts = ("".join(text) for length in range(1, 8) for text in itertools.product("abc", repeat=length))
    seen = {token.id for text in texts for token in model.tokenize(text)}
    for text, token_id in vocabulary.items():
        if len(text) > 1:
            assert _never_made(model, token_id, text) == (token_id not in seen), (text, merges)


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_merges": True},
        {"unk_token": "<x>"},
        {"dropout": 0.1},
        {"byte_fallback": True},
        {"continuing_subword_prefix": "##"},
        {"end_of_word_suffix": "</w>"},
    ],
    ids=str,
)
def test_some_models_may_make_any_token_of_their_vocabulary(options):
    vocabulary = {"<": 0, "x": 1, ">": 2, "<x>": 3}
    assert _never_made(BPE(vocabulary, []), 3, "<x>")
    assert not _never_made(BPE(vocabulary, [], **options), 3, "<x>")
