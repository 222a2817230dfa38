"""Draw the routing of a picture: its tiles apart, each below its tokens, compressed ones tinted.

Nothing is drawn over the picture, so that all text in it stays legible.
"""

from collections.abc import Sequence
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from vico.settings import ModelSettings
from vico.tiling import Tiling, tile_boxes

Colour: TypeAlias = tuple[int, int, int]
KEEP_COLOUR, COMPRESS_COLOUR = (230, 110, 20), (40, 90, 200)
_TINT, _TINT_SHARE = (100, 140, 240), 0.2
# Pixels of the longer side: smaller pictures are enlarged, larger ones reduced, so that tiles are legible.
MIN_LONG_SIDE, MAX_LONG_SIDE = 480, 1600
_MIN_SHORT_SIDE = 48
"""Pixels to which a thinner picture or thumbnail is stretched: its tiles would not be legible."""
_LABELLED, _FRAMED = 64, 32
"""Pixels of the shortest side from which on tiles have labels, and thin frames: so that these never take
half as much room as the tiles."""
_GAP, _CAPTION = 16, 40
_PAPER, _INK = (255, 255, 255), (30, 30, 30)


def routed_picture(
    image: Image.Image,
    tiling: Tiling,
    settings: ModelSettings,
    compressed: Sequence[bool],
    max_long_side: int = MAX_LONG_SIDE,
) -> Image.Image:
    """Return an RGB picture of the tiles, each in a frame below its token count, and the thumbnail beside.

    `compressed` has one decision per tile in prompt order, the thumbnail last. Without the frames, the
    picture has at most `max_long_side` pixels on its longer side. Raises ValueError if the numbers differ.
    """
    boxes = tile_boxes(*image.size, tiling)
    if len(boxes) != len(compressed):
        raise ValueError(f"{len(compressed)} decisions for {len(boxes)} tiles")
    picture = _resized(image, max_long_side)
    scales = (picture.width / image.width, picture.height / image.height) * 2
    cells = len(boxes) - 1 if len(boxes) > 1 and tiling.use_thumbnail else len(boxes)
    tokens = [settings.tokens_compressed if flag else settings.tokens_full for flag in compressed]
    drawn = [[round(side * scale) for side, scale in zip(box, scales, strict=True)] for box in boxes[:cells]]
    labels = [str(count) for count in tokens[:cells]] if _shortest(drawn) >= _LABELLED else []
    parts = [_spread(picture, drawn, compressed[:cells], labels)]
    if cells < len(boxes):
        parts.append(_thumbnail_panel(picture, compressed[-1], tokens[-1]))
    return _captioned(parts, _caption(compressed, sum(tokens), len(boxes) * settings.tokens_full))


def tinted(tile: Image.Image) -> Image.Image:
    """Return an RGB tile in the tint of compressed ones; differences of brightness stay, only smaller."""
    return Image.blend(tile, Image.new("RGB", tile.size, _TINT), _TINT_SHARE)


def tinted_colour(colour: Colour) -> Colour:
    """Return the colour that the tint of compressed tiles makes of `colour`."""
    red, green, blue = (
        round(mine + (tint - mine) * _TINT_SHARE) for mine, tint in zip(colour, _TINT, strict=True)
    )
    return red, green, blue


def _resized(image: Image.Image, max_long_side: int) -> Image.Image:
    longest = max(image.size)
    scale = min(max(longest, MIN_LONG_SIDE), max_long_side) / longest
    size = [max(_MIN_SHORT_SIDE, round(side * scale)) for side in image.size]
    return image.convert("RGB").resize(
        size, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST
    )


def _shortest(boxes: Sequence[Sequence[int]]) -> int:
    return min(min(right - left, bottom - top) for left, top, right, bottom in boxes)


def _spread(
    picture: Image.Image, boxes: Sequence[Sequence[int]], compressed: Sequence[bool], labels: Sequence[str]
) -> Image.Image:
    """Return the tiles of a picture moved apart, with frames around and `labels`, if any, above them."""
    shortest = _shortest(boxes)
    frame = 3 if labels else int(shortest >= _FRAMED)
    font_size = min(20, max(12, shortest // 7))
    font = ImageFont.load_default(font_size)
    strip = font_size + 8 if labels else 0
    across, down = 3 * frame, 3 * frame + strip  # both frames and a gap
    column = {left: n for n, left in enumerate(sorted({box[0] for box in boxes}))}
    row = {top: n for n, top in enumerate(sorted({box[1] for box in boxes}))}
    width = picture.width + len(column) * across - frame
    widths = [round(font.getlength(label)) + 10 for label in labels]
    sheet = Image.new("RGB", (max(width, *widths, 0), picture.height + len(row) * down - frame), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for n, (box, flag) in enumerate(zip(boxes, compressed, strict=True)):
        colour = COMPRESS_COLOUR if flag else KEEP_COLOUR
        left, top = box[0] + column[box[0]] * across, box[1] + row[box[1]] * down
        tile = picture.crop((box[0], box[1], box[2], box[3]))
        if labels:
            draw.rectangle([left, top, left + widths[n] - 1, top + strip], fill=colour)
            draw.text((left + 5, top + 2), labels[n], fill=_PAPER, font=font)
        if frame:
            right, bottom = left + tile.width + 2 * frame - 1, top + strip + tile.height + 2 * frame - 1
            draw.rectangle([left, top + strip, right, bottom], fill=colour)
        sheet.paste(tinted(tile) if flag else tile, (left + frame, top + strip + frame))
    return sheet


def _thumbnail_panel(picture: Image.Image, compressed: bool, tokens: int) -> Image.Image:
    """Return the whole picture, small and never enlarged, with the decision on the thumbnail tile."""
    width = min(picture.width, max(150, picture.width // 4))
    small = picture.resize(
        (width, max(_MIN_SHORT_SIDE, round(picture.height * width / picture.width))), Image.Resampling.BICUBIC
    )
    return _spread(small, [(0, 0, *small.size)], [compressed], [f"thumbnail: {tokens}"])


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
