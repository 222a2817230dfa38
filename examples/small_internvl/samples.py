"""Training samples of the small InternVL: demo pictures of training groups with several questions each.

A batch is a pure function of (seed, batch number), so training can resume at any batch. Besides the answers,
each tile has a map of the letters on its patches: a second target that teaches the vision tower to read
early.
"""

# T tiles of the batch, S tile size, P patches per tile, B samples, L tokens, K letters per patch

import math
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from data_prep.demo import sources
from data_prep.demo.canvas import BOLD, MONO, SANS, SERIF, Canvas, TextRun, TextStyle, ink_on, text_width
from data_prep.demo.content import Content, Question, sheet
from data_prep.demo.pages import line_questions
from data_prep.demo.reading import put_text, text_question
from data_prep.demo.records import KIND_SHARES, conversation, demo_content, group_name
from data_prep.shards.split import TRAIN, Shares, side
from vico.prompt import PromptFormat
from vico.tiling import Tiling, image_tiles, tile_boxes

HELD_OUT = Shares(calib=0.15, test=0.15)
"""The largest calib and test shares of which training saw nothing (split seed 0)."""
LETTERS_PER_PATCH = 4
_MIN_FONT_PIXELS = 8.0  # letters that are smaller in the tile are not part of the map
_QUESTIONS_PER_PICTURE = 4
_LOWER = string.ascii_lowercase
_PRINTABLE = "".join(chr(code) for code in range(33, 127))
_TRANSCRIPTIONS_PER_PICTURE = 2
_SEVERAL_TILES_KEPT = 0.3
"""Kept share of the pictures with several tiles: they cost five times as much and teach the same letters."""

# Shares of kinds in the parts of the curriculum. Only training has `sheet` (a sheet full of letters) and
# `letters` (one random string). The first part trains only the vision tower.
CURRICULUM: tuple[dict[str, float], ...] = (
    {"sheet": 0.80, "prose": 0.08, "code": 0.04, "chart": 0.04, "number": 0.04},
    {"letters": 0.70, "sheet": 0.20, "plain": 0.06, "text": 0.04},
    {"number": 0.35, "word": 0.22, "letters": 0.15, "chart": 0.10, "sheet": 0.15, "plain": 0.03},
    {
        **KIND_SHARES,
        "number": 0.22,
        "word": 0.25,
        "chart": 0.15,
        "caption": 0.10,
        "prose": 0.05,
        "code": 0.02,
        "photograph": 0.05,
        "plain": 0.04,
        "letters": 0.05,
        "sheet": 0.06,
    },
)


@cache
def training_groups() -> tuple[int, ...]:
    """Return the groups that are on the train side of every split with at most the held-out shares."""
    groups = range(sources.NUM_GROUPS)
    return tuple(group for group in groups if side(HELD_OUT, "group", group_name(group).encode()) == TRAIN)


@cache
def _training_photo_groups() -> tuple[int, ...]:
    return tuple(sorted(set(training_groups()) & set(sources.photo_groups())))


@dataclass
class Sample:
    """A picture and its questions.

    tiles uint8 [T, S, S, 3]; ids int64 [L]; answer bool [L], true for answer tokens; letters uint8 [T, P, K],
    where 0 is no letter and 1 to 94 are the ASCII characters "!" to "~".
    """

    tiles: np.ndarray
    ids: np.ndarray
    answer: np.ndarray
    letters: np.ndarray


def _letters_picture(rng: random.Random, group: int) -> Content:
    """Draw a random string of letters or digits, which cannot be guessed from the lexicon."""
    canvas = sheet(rng, group, ((1, 1), (2, 1)), (85, 15))
    alphabet = _LOWER if rng.random() < 0.6 else string.digits
    text = "".join(rng.choices(alphabet, k=rng.randint(1, 6)))
    put_text(canvas, rng, text, rng.uniform(13, 32), (0, 0, canvas.width, canvas.height))
    noun = "number" if text.isdigit() else "word"
    return Content("letters", canvas, [Question(f"Which {noun} is shown?", text, "read")])


def _letter_sheet(rng: random.Random, group: int) -> Content:
    """Draw a sheet full of random strings of one size: many letters per tile to learn from."""
    canvas = sheet(rng, group, ((1, 1),), (1,))
    name = rng.choice((SANS, SANS, BOLD, SERIF, MONO))
    size = math.exp(rng.uniform(math.log(9), math.log(40)))
    style = TextStyle(name, size, ink_on(rng, canvas.background))
    top = rng.uniform(0, 0.5 * size)
    pitch = rng.uniform(1.15, 1.8) * size
    lines = []
    while top + 1.2 * size < canvas.height:
        left, texts = rng.uniform(0, size), []
        while left < canvas.width - size:
            alphabet = rng.choices(
                (_LOWER, string.digits, string.ascii_letters, _PRINTABLE), (50, 30, 10, 10)
            )[0]
            text = "".join(rng.choices(alphabet, k=rng.randint(1, 7)))
            while text and left + canvas.measure(text, name, size) > canvas.width:
                text = text[:-1]
            if not text:
                break
            canvas.text(left, top, text, style)
            left += canvas.measure(text, name, size) + rng.uniform(0.3, 1.5) * size
            texts.append(text)
        lines.append(" ".join(texts))
        top += pitch
    return Content("sheet", canvas, line_questions(rng, lines)[:1])


def _training_questions(rng: random.Random, content: Content) -> list[Question]:
    """Return up to four questions of a picture in random order, at most two of them transcriptions."""
    questions = list(content.questions)
    rng.shuffle(questions)
    transcriptions = [question for question in questions if question.task == "transcribe"]
    transcriptions = transcriptions[:_TRANSCRIPTIONS_PER_PICTURE]
    others = [question for question in questions if question.task != "transcribe"]
    chosen = transcriptions + others[: _QUESTIONS_PER_PICTURE - len(transcriptions)]
    rng.shuffle(chosen)
    return chosen


def letter_map(canvas: Canvas, tiling: Tiling, patch_size: int) -> np.ndarray:
    """Return uint8 [T, P, K]: the first K letters, in reading order, whose centres are on a patch."""
    patches_per_side = tiling.tile_size // patch_size
    boxes = tile_boxes(*canvas.image.size, tiling)
    letters = np.zeros((len(boxes), patches_per_side * patches_per_side, LETTERS_PER_PATCH), np.uint8)
    num_letters = np.zeros(letters.shape[:2], np.int64)
    for tile, (left, top, right, bottom) in enumerate(boxes):
        x_scale, y_scale = tiling.tile_size / (right - left), tiling.tile_size / (bottom - top)
        for run in canvas.runs:
            row = int((run.top + 0.62 * run.size - top) * y_scale // patch_size)
            if run.size * y_scale < _MIN_FONT_PIXELS or not 0 <= row < patches_per_side:
                continue
            for letter, centre in letter_centres(run):
                column = int((centre - left) * x_scale // patch_size)
                if letter == " " or not 0 <= column < patches_per_side:
                    continue
                patch = row * patches_per_side + column
                if num_letters[tile, patch] < LETTERS_PER_PATCH:
                    letters[tile, patch, num_letters[tile, patch]] = letter_code(letter)
                    num_letters[tile, patch] += 1
    return letters


def letter_centres(run: TextRun) -> Iterator[tuple[str, float]]:
    """Yield each letter of a text and the x coordinate of its centre in picture pixels."""
    x = run.left
    for letter in run.text:
        width = text_width(letter, run.font, run.size)
        yield letter, x + width / 2
        x += width


def letter_code(letter: str) -> int:
    return max(ord(letter) - 32, 0) if ord(letter) < 127 else 0


def _training_content(rng: random.Random, kind: str, group: int) -> Content:
    """Draw a picture of a kind; most have a single tile."""
    training_only = {"letters": _letters_picture, "sheet": _letter_sheet}.get(kind)
    while True:
        content = training_only(rng, group) if training_only else demo_content(rng, kind, group)
        if content.canvas.columns * content.canvas.rows == 1 or rng.random() < _SEVERAL_TILES_KEPT:
            return content


def make_sample(rng: random.Random, shares: dict[str, float], form: PromptFormat, patch_size: int) -> Sample:
    """Draw a training sample: a kind by `shares`, a training group, a picture and questions."""
    kind = rng.choices(list(shares), list(shares.values()))[0]
    has_photograph = kind in ("photograph", "caption", "figure") or rng.random() < 0.2
    group = rng.choice(_training_photo_groups() if has_photograph else training_groups())
    tiling = form.settings.tiling()
    size, num_patches = tiling.tile_size, (tiling.tile_size // patch_size) ** 2
    if kind == "text":
        tiles = np.zeros((0, size, size, 3), np.uint8)
        letters = np.zeros((0, num_patches, LETTERS_PER_PATCH), np.uint8)
        turns = conversation([text_question(rng, group) for _ in range(3)], False)
        tiles_per_image = []
    else:
        content = _training_content(rng, kind, group)
        tiles = np.stack([np.asarray(tile) for tile in image_tiles(content.canvas.image, tiling)])
        letters = letter_map(content.canvas, tiling, patch_size)
        turns = conversation(_training_questions(rng, content), True)
        tiles_per_image = [len(tiles)]
    skeleton = form.encode(turns, tiles_per_image)
    is_tile = skeleton.ids == form.settings.image_token_id
    num_tokens = np.where(is_tile, form.settings.tokens_full, 1)
    ids = np.repeat(skeleton.ids, num_tokens)
    answer = np.repeat(skeleton.answer & ~is_tile, num_tokens)
    return Sample(tiles, ids, answer, letters)


@dataclass
class Batch:
    """The arrays of a batch: tiles uint8 [T, S, S, 3], ids and answer [B, L], letters uint8 [T, P, K]."""

    tiles: np.ndarray
    ids: np.ndarray
    answer: np.ndarray
    letters: np.ndarray


def make_batch(seed: int, number: int, part: int, size: int, form: PromptFormat, patch_size: int) -> Batch:
    """Return batch `number`, of `size` samples, for a part of the curriculum.

    Eight consecutive batches come from one pool that is sorted by length, so that padding stays small.
    """
    pool, number_in_pool = divmod(number, _BATCHES_PER_POOL)
    samples = _pool(seed, pool, part, size * _BATCHES_PER_POOL, form, patch_size)
    order = random.Random(f"order {seed} {pool}").sample(range(_BATCHES_PER_POOL), _BATCHES_PER_POOL)
    first = order[number_in_pool] * size
    chosen = samples[first : first + size]
    longest = max(len(sample.ids) for sample in chosen)
    ids = np.zeros((size, longest), np.int64)
    answer = np.zeros((size, longest), bool)
    for i, sample in enumerate(chosen):
        ids[i, : len(sample.ids)], answer[i, : len(sample.ids)] = sample.ids, sample.answer & (part > 0)
    tiles = np.concatenate([sample.tiles for sample in chosen])
    return Batch(tiles, ids, answer, np.concatenate([sample.letters for sample in chosen]))


_BATCHES_PER_POOL = 8
_pools: dict[tuple[int, int, int, int], list[Sample]] = {}


def _pool(seed: int, pool: int, part: int, size: int, form: PromptFormat, patch_size: int) -> list[Sample]:
    key = (seed, pool, part, size)
    if key not in _pools:
        _pools.clear()
        rng = random.Random(f"small internvl {seed} {part} {pool}")
        samples = [make_sample(rng, CURRICULUM[part], form, patch_size) for _ in range(size)]
        _pools[key] = sorted(samples, key=lambda sample: (len(sample.ids), len(sample.tiles)))
    return _pools[key]
