"""The small InternVL's example: tokenizer, letter maps, and training that never sees the test side."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[3] / "examples/small_internvl"
sys.path.insert(0, str(EXAMPLE))

import make_model  # noqa: E402
import samples  # noqa: E402

from data_prep.demo.canvas import SANS, Canvas  # noqa: E402
from data_prep.demo.records import group_name  # noqa: E402
from data_prep.shards.split import TRAIN, Shares, side  # noqa: E402
from vico.prompt import load_prompt_format  # noqa: E402
from vico.tiling import Tiling  # noqa: E402


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    sizes = {"vision-width": 32, "vision-layers": 1, "vision-heads": 2, "text-width": 32, "text-hidden": 32}
    sizes |= {"text-layers": 1, "text-heads": 2, "tile-size": 56}
    options = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    args = make_model.parser().parse_args([str(folder), *options])
    make_model.make_model(folder, args)
    return folder


def test_start_model_opens_at_another_tile_size(start):
    from vico.checkpoints import load_model

    form = load_prompt_format(start)
    assert (form.settings.tile_size, form.settings.tokens_full, form.settings.tokens_compressed) == (56, 4, 1)
    load_model(start)


def test_tokenizer_spells_answers_letter_by_letter_and_gives_text_back(start):
    tokenizer = load_prompt_format(start).tokenizer
    assert len(tokenizer("4711")["input_ids"]) == 4
    assert len(tokenizer("lantern")["input_ids"]) == 7
    assert len(tokenizer(" number")["input_ids"]) == 1
    for text in ("Which number is on the left?", "naïve — 12,5 %\n  if x:", "assistant user users"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_letter_map_names_the_letters_on_each_patch():
    canvas = Canvas(1, 1, 1.0)
    canvas.text(0, 0, "ab", SANS, 14, (0, 0, 0))
    canvas.text(0, 56, "7", SANS, 14, (0, 0, 0))
    canvas.text(0, 100, "x", SANS, 7, (0, 0, 0))  # too small to be asked for
    letters = samples.letter_map(canvas, Tiling(112, 4), 14)
    assert letters.shape == (1, 64, samples.LETTERS_A_PATCH)
    found = {(int(p), int(k)): chr(letters[0, p, k] + 32) for p, k in np.argwhere(letters[0])}
    assert found == {(0, 0): "a", (0, 1): "b", (4 * 8, 0): "7"}


def test_training_groups_are_on_the_train_side_of_every_smaller_split():
    for share in (0.05, 0.1, 0.15):
        for group in samples.training_groups():
            assert side(Shares(calib=share, test=share), "group", group_name(group).encode()) == TRAIN


def test_batches_are_repeatable_and_answers_follow_the_pictures(start):
    form = load_prompt_format(start)
    first, again = (samples.make_batch(0, 3, 3, 4, form, 14) for _ in range(2))
    other = samples.make_batch(0, 4, 3, 4, form, 14)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["ids"], other["ids"])
    assert (first["ids"] == form.settings.image_token_id).sum() == len(
        first["tiles"]
    ) * form.settings.tokens_full
    assert first["answer"].any(1).all()


def test_first_part_trains_on_letters_alone(start):
    batch = samples.make_batch(0, 0, 0, 4, load_prompt_format(start), 14)
    assert not batch["answer"].any() and batch["letters"].any()


def test_training_draws_from_training_groups_only(start, monkeypatch):
    form, drawn = load_prompt_format(start), []
    content = samples.demo_content
    monkeypatch.setattr(
        samples, "demo_content", lambda rng, kind, group: drawn.append(group) or content(rng, kind, group)
    )
    rng = random.Random(0)
    for _ in range(40):
        samples.make_sample(rng, samples.CURRICULUM[-1], form, 14)
    assert drawn and set(drawn) <= set(samples.training_groups())
