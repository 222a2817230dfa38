"""The sheet a demo picture is drawn on: text in DejaVu fonts, backgrounds, a note of what went where.

Sizes are given in tile units: one unit is one pixel of a 112 pixel tile, whatever the picture's own scale.
"""

import io
import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.demo.sources import NUM_GROUPS, package_folder

TILE = 112  # pixels of a tile the demo is designed for; another tile size only rescales the pictures
COLOURS: dict[str, tuple[int, int, int]] = {
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
    """A DejaVu font of matplotlib at a whole number of pixels."""
    path = package_folder("matplotlib") / "mpl-data/fonts/ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=65536)
def text_width(text: str, name: str, size: int) -> float:
    return font(name, size).getlength(text)


def group_colour(rng: random.Random, name: str, group: int) -> tuple[int, int, int]:
    """A shade of a named colour; its remainders by 5 spell the group, so no split shares an exact shade."""
    remainders = (group % 5, group // 5 % 5, group // 25)
    shade = []
    for level, remainder in zip(COLOURS[name], remainders, strict=True):
        level = min(max(level + rng.randint(-_JITTER, _JITTER), 0), 250)
        shade.append(level - level % 5 + remainder)
    return tuple(shade)


assert NUM_GROUPS <= 125, "group_colour has 5 x 5 x 5 remainders"


def luminance(colour: tuple[int, int, int]) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def ink_on(rng: random.Random, background: tuple[int, int, int]) -> tuple[int, int, int]:
    """A text colour with strong contrast to the background."""
    if 90 < luminance(background) < 170:
        return (0, 0, 0) if luminance(background) > 120 else (255, 255, 255)
    if luminance(background) > 120:
        return rng.choice(((0, 0, 0), (20, 20, 70), (70, 10, 10), (0, 50, 20), (40, 40, 40)))
    return rng.choice(((255, 255, 255), (255, 255, 210), (225, 240, 255)))


@dataclass(frozen=True)
class TextRun:
    """A piece of text as drawn: left and top in picture pixels, size in picture pixels."""

    left: float
    top: float
    text: str
    font: str
    size: int


@dataclass
class Canvas:
    """A picture of `columns` x `rows` tiles at `scale` pixels a tile unit, and what was drawn on it."""

    columns: int
    rows: int
    scale: float
    background: tuple[int, int, int] = (255, 255, 255)
    runs: list[TextRun] = field(default_factory=list)
    photographs: list[tuple[int, int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        side = round(TILE * self.scale)
        self.image = Image.new("RGB", (side * self.columns, side * self.rows), self.background)
        self.draw = ImageDraw.Draw(self.image)

    @property
    def width(self) -> float:
        """Width in tile units."""
        return self.image.width / self.scale

    @property
    def height(self) -> float:
        """Height in tile units."""
        return self.image.height / self.scale

    def box(self, left: float, top: float, right: float, bottom: float) -> tuple[int, int, int, int]:
        """A box of tile units in whole picture pixels."""
        return tuple(round(value * self.scale) for value in (left, top, right, bottom))

    def pixels(self, size: float) -> int:
        """A font size of tile units in whole picture pixels."""
        return max(round(size * self.scale), 6)

    def measure(self, text: str, name: str, size: float) -> float:
        """Width of a text in tile units."""
        return text_width(text, name, self.pixels(size)) / self.scale

    def text(
        self, left: float, top: float, text: str, name: str, size: float, fill: tuple[int, int, int]
    ) -> None:
        """Draws one line of text with its box's left top corner at the given place, in tile units."""
        run = TextRun(round(left * self.scale), round(top * self.scale), text, name, self.pixels(size))
        self.draw.text((run.left, run.top), text, font=font(name, run.size), fill=fill)
        self.runs.append(run)

    def rectangle(
        self, left: float, top: float, right: float, bottom: float, fill: tuple[int, int, int]
    ) -> None:
        self.draw.rectangle(self.box(left, top, right, bottom), fill=fill)

    def photograph(self, picture: Image.Image, left: float, top: float, right: float, bottom: float) -> None:
        """Pastes a picture, resized to the box given in tile units."""
        box = self.box(left, top, right, bottom)
        size = (max(box[2] - box[0], 1), max(box[3] - box[1], 1))
        self.image.paste(picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0), box[:2])
        self.photographs.append(box)

    def gradient(self, end: tuple[int, int, int], horizontal: bool) -> None:
        """Fills the picture with a ramp from the background to another colour."""
        width, height = self.image.size
        ramp = np.linspace(0.0, 1.0, width if horizontal else height)[:, None]
        line = np.asarray(self.background) * (1 - ramp) + np.asarray(end) * ramp
        line = np.rint(line).astype(np.uint8)
        full = np.broadcast_to(line[None] if horizontal else line[:, None], (height, width, 3))
        self.image.paste(Image.fromarray(np.ascontiguousarray(full)))

    def speckle(self, rng: random.Random, strength: int) -> None:
        """Adds faint noise, the near-plain case: paper, sensor noise."""
        width, height = self.image.size
        noise = np.random.default_rng(rng.getrandbits(32)).integers(
            -strength, strength + 1, (height, width, 1)
        )
        noisy = np.asarray(self.image, np.int16) + noise
        self.image.paste(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)))

    def encoded(self, format_name: str) -> bytes:
        """The picture as PNG or JPEG bytes, the same bytes every time."""
        buffer = io.BytesIO()
        options = {"compress_level": 1} if format_name == "PNG" else {"quality": 88}
        self.image.save(buffer, format_name, **options)
        return buffer.getvalue()
