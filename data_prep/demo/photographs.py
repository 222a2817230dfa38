"""Demo pictures without text (photographs, plain and almost plain ones) and photographs with a caption."""

import random

import numpy as np
from PIL import Image

from data_prep.demo import sources
from data_prep.demo.canvas import BOLD, COLOURS, SANS, SERIF, Canvas, TextStyle, group_colour, ink_on
from data_prep.demo.content import Content, Question, colour_question, look_question, sheet
from data_prep.demo.lexicon import LEXICON

_NAMES = tuple(COLOURS)
# Upper bounds of the hues, in sixths of the colour circle, starting at pure red.
_HUE_ENDS = np.asarray([0.3, 0.75, 1.1, 2.9, 4.2, 5.0, 5.6])
_HUES = np.asarray(["red", "orange", "yellow", "green", "blue", "purple", "pink", "red"])
_ASK_COLOUR = ("What is the main colour?", "Which colour is most of the picture?")


def photograph_crop(rng: random.Random, group: int, aspect: float) -> Image.Image:
    """Draw a crop of the group's photograph with an aspect ratio (width over height), perhaps mirrored."""
    picture = sources.group_photograph(group)
    share = rng.uniform(0.3, 1.0)
    width = min(picture.width, picture.height * aspect) * share
    height = width / aspect
    left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
    crop = picture.crop((int(left), int(top), int(left + width), int(top + height)))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def colour_names(pixels: np.ndarray) -> np.ndarray:
    """Return the colour name of each pixel of `pixels` [N, 3]; brown is a dark orange, pink a light red."""
    pixels = pixels.astype(np.float32)
    high, low = pixels.max(-1), pixels.min(-1)
    chroma = np.maximum(high - low, 1e-3)
    red, green, blue = pixels.T
    hue = np.where(
        high == red,
        (green - blue) / chroma % 6,
        np.where(high == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    names = _HUES[np.searchsorted(_HUE_ENDS, hue)]
    names = np.where((names == "orange") & (high < 170), "brown", names)
    names = np.where((names == "red") & (low > 110), "pink", names)
    gray = np.where(high > 205, "white", np.where(high < 55, "black", "gray"))
    return np.where((chroma < 0.18 * high) | (high < 40), gray, names)


def main_colour(picture: Image.Image) -> str | None:
    """Return the colour that has half of the picture and twice the share of the next one, or None."""
    small = np.asarray(picture.resize((16, 16), Image.Resampling.BOX)).reshape(-1, 3)
    names, counts = np.unique(colour_names(small), return_counts=True)
    order = counts.argsort()[::-1]
    runner_up = counts[order[1]] if len(order) > 1 else 0
    is_clear = counts[order[0]] >= max(len(small) / 2, 2 * runner_up)
    return str(names[order[0]]) if is_clear else None


def photograph_picture(rng: random.Random, group: int) -> Content:
    """Draw a photograph that fills the picture."""
    canvas = Canvas(
        *rng.choices(((1, 1), (2, 1), (1, 2), (2, 2)), (40, 12, 12, 36))[0], rng.uniform(0.8, 1.4)
    )
    crop = photograph_crop(rng, group, canvas.width / canvas.height)
    canvas.photograph(crop, 0, 0, canvas.width, canvas.height)
    questions = [
        look_question(rng, "photograph"),
        Question("Is there any text in the picture?", "no", "look"),
    ]
    rng.shuffle(questions)
    colour = main_colour(canvas.image)
    if colour:
        questions = [colour_question(rng.choice(_ASK_COLOUR), colour), *questions]
    return Content("photograph", canvas, questions, "JPEG")


def plain_picture(rng: random.Random, group: int) -> Content:
    """Draw a picture of one colour: flat, with a faint ramp, or with faint noise."""
    name = rng.choice(_NAMES)
    canvas = Canvas(
        *rng.choices(((1, 1), (2, 1), (1, 2), (2, 2)), (46, 12, 12, 30))[0],
        rng.uniform(0.8, 1.4),
        group_colour(rng, name, group),
    )
    style = rng.choice(("flat", "ramp", "speckle"))
    if style == "ramp":
        canvas.gradient(group_colour(rng, name, group), rng.random() < 0.5)
    elif style == "speckle":
        canvas.speckle(rng, rng.randint(2, 6))
    questions = [
        colour_question(rng.choice((*_ASK_COLOUR, "Which colour is this?")), name),
        look_question(rng, "plain"),
        Question("Is there any text in the picture?", "no", "look"),
    ]
    if rng.random() < 0.4:
        rng.shuffle(questions)
    return Content("plain", canvas, questions)


def caption_picture(rng: random.Random, group: int) -> Content:
    """Draw a photograph and, above or below it, a strip with a word of the lexicon."""
    canvas = sheet(rng, group, ((1, 1), (2, 2), (1, 2)), (45, 40, 15))
    size = rng.uniform(13, 17) * (1 if canvas.columns == 1 else rng.uniform(1.1, 1.7))
    strip = 1.6 * size
    at_top = rng.random() < 0.3
    top = strip if at_top else 0
    crop = photograph_crop(rng, group, canvas.width / (canvas.height - strip))
    canvas.photograph(crop, 0, top, canvas.width, top + canvas.height - strip)
    word = rng.choice(LEXICON)
    name = rng.choice((SANS, BOLD, SERIF))
    left = rng.uniform(3, canvas.width - 3 - canvas.measure(word, name, size))
    strip_top = 0.15 * size if at_top else canvas.height - strip + 0.15 * size
    canvas.text(left, strip_top, word, TextStyle(name, size, ink_on(rng, canvas.background)))
    questions = [Question(rng.choice(("Which word is in the caption?", "Read the caption.")), word, "read")]
    looks = [look_question(rng, "photograph"), Question("Is there any text in the picture?", "yes", "look")]
    rng.shuffle(looks)
    return Content("caption", canvas, [*questions, *looks], "JPEG" if canvas.scale > 1.1 else "PNG")
