"""The canvas of a demo picture: draws text, photographs and backgrounds, and records what is where.

Text is set in the DejaVu fonts of matplotlib.

Sizes are in tile units: one unit is one pixel of a 112 pixel tile, whatever the scale of the picture.
"""

import io
import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.demo.sources import NUM_GROUPS, package_folder

TILE = 112
"""Side in pixels of the tiles that the demo is designed for; another tile size only rescales the pictures."""
Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
COLOURS: dict[str, Colour] = {
    "red": (205, 35, 35),
    "orange": (240, 140, 20),
    "yellow": (240, 225, 40),
    "green": (40, 150, 55),
    "blue": (40, 75, 205),
    "purple": (120, 40, 160),
    "pink": (250, 150, 190),
    "brown": (115, 70, 30),
    "black": (20, 20, 20),
    "gray": (130, 130, 130),
    "white": (248, 248, 248),
}
SANS, BOLD, SERIF, MONO = "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono"
_JITTER = 7


@lru_cache(maxsize=256)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Return a DejaVu font of matplotlib at a size in pixels."""
    path = package_folder("matplotlib") / "mpl-data/fonts/ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=65536)
def text_width(text: str, name: str, size: int) -> float:
    """Return the width in pixels of a text in a font."""
    return font(name, size).getlength(text)


def group_colour(rng: random.Random, name: str, group: int) -> Colour:
    """Draw a shade of a named colour.

    Its remainders modulo 5 encode the group, so that no two sides of a split share an exact shade.
    """
    red, green, blue = COLOURS[name]
    return (
        _shade(rng, red, group % 5),
        _shade(rng, green, group // 5 % 5),
        _shade(rng, blue, group // 25),
    )


def _shade(rng: random.Random, level: int, remainder: int) -> int:
    level = min(max(level + rng.randint(-_JITTER, _JITTER), 0), 250)
    return level - level % 5 + remainder


assert NUM_GROUPS <= 125, "group_colour has 5 x 5 x 5 remainders"


def luminance(colour: Colour) -> float:
    """Return the brightness of a colour by ITU-R BT.601, from 0 to 255."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def ink_on(rng: random.Random, background: Colour) -> Colour:
    """Draw a text colour with strong contrast to the background."""
    if 90 < luminance(background) < 170:
        return (0, 0, 0) if luminance(background) > 120 else (255, 255, 255)
    if luminance(background) > 120:
        return rng.choice(((0, 0, 0), (20, 20, 70), (70, 10, 10), (0, 50, 20), (40, 40, 40)))
    return rng.choice(((255, 255, 255), (255, 255, 210), (225, 240, 255)))


@dataclass(frozen=True)
class TextStyle:
    """Font name, size in tile units, and colour of a text."""

    font: str
    size: float
    colour: Colour


@dataclass(frozen=True)
class TextRun:
    """A piece of text as drawn: left, top and font size in picture pixels."""

    left: float
    top: float
    text: str
    font: str
    size: int


@dataclass
class Canvas:
    """A picture of `columns` x `rows` tiles at `scale` pixels per tile unit, and what was drawn on it.

    `photographs` has the boxes of the photographs in picture pixels.
    """

    columns: int
    rows: int
    scale: float
    background: Colour = (255, 255, 255)
    runs: list[TextRun] = field(default_factory=list)
    photographs: list[tuple[int, int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        side = round(TILE * self.scale)
        self.image = Image.new("RGB", (side * self.columns, side * self.rows), self.background)
        self.draw = ImageDraw.Draw(self.image)

    @property
    def width(self) -> float:
        """Return the width in tile units."""
        return self.image.width / self.scale

    @property
    def height(self) -> float:
        """Return the height in tile units."""
        return self.image.height / self.scale

    def box(self, left: float, top: float, right: float, bottom: float) -> tuple[int, int, int, int]:
        """Return a box of tile units in whole picture pixels."""
        return (
            round(left * self.scale),
            round(top * self.scale),
            round(right * self.scale),
            round(bottom * self.scale),
        )

    def pixels(self, size: float) -> int:
        """Return a font size of tile units in whole picture pixels, at least 6."""
        return max(round(size * self.scale), 6)

    def measure(self, text: str, name: str, size: float) -> float:
        """Return the width of a text in a font at a size, in tile units."""
        return text_width(text, name, self.pixels(size)) / self.scale

    def text(self, left: float, top: float, text: str, style: TextStyle) -> None:
        """Draw one line of text with the left top corner of its box at a position in tile units."""
        size = self.pixels(style.size)
        run = TextRun(round(left * self.scale), round(top * self.scale), text, style.font, size)
        self.draw.text((run.left, run.top), text, font=font(style.font, size), fill=style.colour)
        self.runs.append(run)

    def rectangle(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        """Fill a box of tile units."""
        self.draw.rectangle(self.box(left, top, right, bottom), fill=fill)

    def photograph(self, picture: Image.Image, left: float, top: float, right: float, bottom: float) -> None:
        """Paste a picture, resized to a box of tile units."""
        box = self.box(left, top, right, bottom)
        size = (max(box[2] - box[0], 1), max(box[3] - box[1], 1))
        self.image.paste(picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0), box[:2])
        self.photographs.append(box)

    def gradient(self, end: Colour, horizontal: bool) -> None:
        """Fill the picture with a ramp from the background to another colour."""
        width, height = self.image.size
        ramp = np.linspace(0.0, 1.0, width if horizontal else height)[:, None]
        blend = np.asarray(self.background) * (1 - ramp) + np.asarray(end) * ramp
        line = np.rint(blend).astype(np.uint8)
        full = np.broadcast_to(line[None] if horizontal else line[:, None], (height, width, 3))
        self.image.paste(Image.fromarray(np.ascontiguousarray(full)))

    def speckle(self, rng: random.Random, strength: int) -> None:
        """Add faint noise of up to `strength` levels, as of paper or a sensor."""
        width, height = self.image.size
        noise = np.random.default_rng(rng.getrandbits(32)).integers(
            -strength, strength + 1, (height, width, 1)
        )
        noisy = np.asarray(self.image, np.int16) + noise
        self.image.paste(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)))

    def encoded(self, format_name: str) -> bytes:
        """Return the picture as PNG or JPEG bytes, the same bytes every time."""
        buffer = io.BytesIO()
        options = {"compress_level": 1} if format_name == "PNG" else {"quality": 88}
        self.image.save(buffer, format_name, **options)
        return buffer.getvalue()
