"""Draw the routing over a picture: the tokens of each tile, a veil on compressed ones, the thumbnail."""

from collections.abc import Sequence
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from vico.settings import ModelSettings
from vico.tiling import Tiling, tile_boxes

Colour: TypeAlias = tuple[int, int, int]
KEEP_COLOUR, COMPRESS_COLOUR = (230, 110, 20), (40, 90, 200)
_VEIL = (190, 205, 235, 150)
# Pixels of the longer side: smaller pictures are enlarged, larger ones reduced, so that labels are legible.
MIN_LONG_SIDE, MAX_LONG_SIDE = 480, 1600
_MIN_SHORT_SIDE = 48
"""Pixels to which a thinner picture or thumbnail is stretched: its tiles and labels would not be legible."""
_GAP, _CAPTION = 16, 40
_PAPER, _INK = (255, 255, 255), (30, 30, 30)
_THUMBNAIL = "thumbnail"


def routed_picture(
    image: Image.Image,
    tiling: Tiling,
    settings: ModelSettings,
    compressed: Sequence[bool],
    max_long_side: int = MAX_LONG_SIDE,
) -> Image.Image:
    """Return an RGB picture with a frame and the token count on every tile, and the thumbnail beside it.

    `compressed` has one decision per tile in prompt order, the thumbnail last. The picture is drawn with at
    most `max_long_side` pixels on its longer side. Raises ValueError if the numbers differ.
    """
    boxes = tile_boxes(*image.size, tiling)
    if len(boxes) != len(compressed):
        raise ValueError(f"{len(compressed)} decisions for {len(boxes)} tiles")
    picture = _resized(image, max_long_side)
    scales = (picture.width / image.width, picture.height / image.height) * 2
    cells = len(boxes) - 1 if len(boxes) > 1 and tiling.use_thumbnail else len(boxes)
    tokens = [settings.tokens_compressed if flag else settings.tokens_full for flag in compressed]
    marked = picture.copy()
    for box, flag, count in list(zip(boxes, compressed, tokens, strict=True))[:cells]:
        drawn_box = [round(side * scale) for side, scale in zip(box, scales, strict=True)]
        marked = _with_tile(marked, drawn_box, flag, str(count))
    parts = [marked]
    if cells < len(boxes):
        parts.append(_thumbnail_panel(picture, compressed[-1], tokens[-1]))
    return _captioned(parts, _caption(compressed, sum(tokens), len(boxes) * settings.tokens_full))


def _resized(image: Image.Image, max_long_side: int) -> Image.Image:
    longest = max(image.size)
    scale = min(max(longest, MIN_LONG_SIDE), max_long_side) / longest
    size = [max(_MIN_SHORT_SIDE, round(side * scale)) for side in image.size]
    return image.convert("RGB").resize(
        size, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST
    )


def _with_tile(picture: Image.Image, box: Sequence[int], compressed: bool, label: str) -> Image.Image:
    """Return the picture with one tile marked: a frame, a label, and a veil with diagonals if compressed."""
    left, top, right, bottom = box
    colour = COMPRESS_COLOUR if compressed else KEEP_COLOUR
    if compressed:
        veil = Image.new("RGBA", (max(1, right - left), max(1, bottom - top)), _VEIL)
        lines = ImageDraw.Draw(veil)
        for x in range(-veil.height, veil.width, 14):
            lines.line([(x, veil.height), (x + veil.height, 0)], fill=(*COMPRESS_COLOUR, 110), width=1)
        picture = picture.copy()
        picture.paste(veil, (left, top), veil)
    draw = ImageDraw.Draw(picture)
    if right - left > 2 and bottom - top > 2:  # Pillow refuses a rectangle whose ends are the wrong way round
        draw.rectangle([left + 1, top + 1, right - 2, bottom - 2], outline=colour, width=3)
    _label(draw, (left + 8, top + 8), label, colour, min(22, max(10, min(bottom - top, right - left) // 5)))
    return picture


def _label(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, colour: Colour, size: int) -> None:
    font = ImageFont.load_default(size)
    left, top, right, bottom = draw.textbbox(corner, text, font=font)
    draw.rectangle([left - 4, top - 3, right + 4, bottom + 3], fill=colour)
    draw.text(corner, text, fill=_PAPER, font=font)


def _thumbnail_panel(picture: Image.Image, compressed: bool, tokens: int) -> Image.Image:
    """Return the whole picture, small and never enlarged, with the decision on the thumbnail tile."""
    width = min(picture.width, max(150, picture.width // 4))
    small = picture.resize(
        (width, max(_MIN_SHORT_SIDE, round(picture.height * width / picture.width))), Image.Resampling.BICUBIC
    )
    small = _with_tile(small, (0, 0, *small.size), compressed, str(tokens))
    font = ImageFont.load_default(16)
    panel_width = max(width, round(font.getlength(_THUMBNAIL)))
    panel = Image.new("RGB", (panel_width, small.height + 26), _PAPER)
    ImageDraw.Draw(panel).text((0, 2), _THUMBNAIL, fill=_INK, font=font)
    panel.paste(small, (0, 26))
    return panel


def _caption(compressed: Sequence[bool], tokens: int, tokens_full: int) -> str:
    saved = f"{tokens} of {tokens_full} tokens ({1 - tokens / tokens_full:.0%} saved)"
    return f"{sum(compressed)} of {len(compressed)} tiles compressed, {saved}"


def _captioned(parts: Sequence[Image.Image], caption: str) -> Image.Image:
    """Return the parts side by side on white, with the caption below."""
    font = ImageFont.load_default(18)
    width = sum(part.width for part in parts) + _GAP * (len(parts) - 1)
    height = max(part.height for part in parts)
    sheet = Image.new("RGB", (max(width, round(font.getlength(caption)) + 8), height + _CAPTION), _PAPER)
    left = 0
    for part in parts:
        sheet.paste(part, (left, 0))
        left += part.width + _GAP
    ImageDraw.Draw(sheet).text((4, height + 9), caption, fill=_INK, font=font)
    return sheet
