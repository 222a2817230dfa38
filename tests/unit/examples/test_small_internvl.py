"""The example of the small InternVL: tokenizer, letter maps, and training that never sees the test side."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[3] / "examples/small_internvl"
sys.path.insert(0, str(EXAMPLE))

import make_model  # noqa: E402
import samples  # noqa: E402

from data_prep.demo.canvas import SANS, Canvas, TextStyle  # noqa: E402
from data_prep.demo.content import Content  # noqa: E402
from data_prep.demo.records import group_name  # noqa: E402
from data_prep.shards.split import TRAIN, Shares, side  # noqa: E402
from vico.prompt import load_prompt_format  # noqa: E402
from vico.tiling import Tiling  # noqa: E402


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """Folder of an untrained model with small layers and tiles of 56 pixels."""
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


def test_the_tokenizer_spells_answers_letter_by_letter_and_restores_text(start):
    tokenizer = load_prompt_format(start).tokenizer
    assert len(tokenizer("4711")["input_ids"]) == 4
    assert len(tokenizer("lantern")["input_ids"]) == 7
    assert len(tokenizer(" number")["input_ids"]) == 1
    for text in ("Which number is on the left?", "naïve — 12,5 %\n  if x:", "assistant user users"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_letter_map_names_the_letters_on_each_patch():
    canvas = Canvas(1, 1, 1.0)
    canvas.text(0, 0, "ab", TextStyle(SANS, 14, (0, 0, 0)))
    canvas.text(0, 56, "7", TextStyle(SANS, 14, (0, 0, 0)))
    canvas.text(0, 100, "x", TextStyle(SANS, 7, (0, 0, 0)))  # too small for the map
    letters = samples.letter_map(canvas, Tiling(112, 4), 14)
    assert letters.shape == (1, 64, samples.LETTERS_PER_PATCH)
    letters_at = {(int(p), int(k)): chr(letters[0, p, k] + 32) for p, k in np.argwhere(letters[0])}
    assert letters_at == {(0, 0): "a", (0, 1): "b", (4 * 8, 0): "7"}


def test_training_groups_are_on_the_train_side_of_every_smaller_split():
    for share in (0.05, 0.1, 0.15):
        for group in samples.training_groups():
            assert side(Shares(calib=share, test=share), "group", group_name(group).encode()) == TRAIN


def test_batches_are_repeatable_and_answers_follow_the_pictures(start):
    form = load_prompt_format(start)
    batch, repeated = (samples.make_batch(0, 3, 3, 4, form, 14) for _ in range(2))
    other = samples.make_batch(0, 4, 3, 4, form, 14)
    assert all(np.array_equal(array, getattr(repeated, name)) for name, array in vars(batch).items())
    assert not np.array_equal(batch.ids, other.ids)
    num_image_tokens = (batch.ids == form.settings.image_token_id).sum()
    assert num_image_tokens == len(batch.tiles) * form.settings.tokens_full
    assert batch.answer.any(1).all()


def test_the_first_part_trains_only_on_letters(start):
    batch = samples.make_batch(0, 0, 0, 4, load_prompt_format(start), 14)
    assert not batch.answer.any() and batch.letters.any()


def test_training_draws_from_training_groups_only(start, monkeypatch):
    form, groups = load_prompt_format(start), set()
    demo_content = samples.demo_content

    def recorded_content(rng: random.Random, kind: str, group: int) -> Content:
        groups.add(group)
        return demo_content(rng, kind, group)

    monkeypatch.setattr(samples, "demo_content", recorded_content)
    rng = random.Random(0)
    for _ in range(40):
        samples.make_sample(rng, samples.CURRICULUM[-1], form, 14)
    assert groups and groups <= set(samples.training_groups())
