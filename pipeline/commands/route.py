"""`vico route`: which tiles of a picture a routed model compresses, as a table, as JSON, drawn over the
picture.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from PIL import Image
from rich.table import Table

from pipeline.commands.tables import console
from vico.errors import UserError
from vico.settings import ModelSettings, load_settings, own_threshold
from vico.tiling import tile_boxes, tile_grid

if TYPE_CHECKING:
    from vico.model.internvl import VicoModel


DRAWN_FORMATS = (".png", ".jpg", ".jpeg", ".webp")
_GAP = 24  # pixels between pictures drawn below each other


@dataclass(frozen=True)
class RoutedImage:
    """A picture with the router's probability and decision for each of its tiles, thumbnail last."""

    path: Path
    image: Image.Image
    p_compress: tuple[float, ...]
    compressed: tuple[bool, ...]


def route(
    model: Path,
    images: Sequence[Path],
    out: Path | None = None,
    threshold: float | None = None,
    as_json: bool = False,
) -> None:
    """Prints the tiles of each picture with their tokens; with `out` draws all pictures into that file.

    A tile is compressed where P(compress) >= `threshold` (None: the model's own). Raises UserError for a
    model without a router, a picture that does not decode, and a place that cannot be written.
    """
    if out is not None:
        _refuse_bad_place(out)
    settings = load_settings(model)
    threshold = own_threshold(model) if threshold is None else threshold
    opened = [opened_picture(path) for path in images]
    routed = _routed(model, list(zip(images, opened, strict=True)), threshold)
    if out is not None:
        _write(drawing(routed, settings), out)
    if as_json:
        typer.echo(json.dumps([as_object(one, settings, threshold) for one in routed], ensure_ascii=False))
        return
    for one in routed:
        size = f"{one.image.width} x {one.image.height}"
        console().print(f"{one.path}: {size}, compressed from P(compress) {threshold:.4g} on", markup=False)
        console().print(tiles_table(one, settings))
    if out is not None:
        console().print(f"drawn to {out}", markup=False)


def opened_picture(path: Path) -> Image.Image:
    """The picture as RGB; UserError when it is missing or does not decode."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"IMAGE={path} does not exist; give the path of a picture") from error
    except Image.DecompressionBombError as error:
        raise UserError(
            f"IMAGE={path} has too many pixels to decode safely; give a smaller picture"
        ) from error
    except Exception as error:  # decoders raise what they like on broken bytes
        reason = " ".join(str(error).split())
        raise UserError(f"IMAGE={path} does not decode ({reason}); give a whole JPEG, PNG or WebP") from error


def _routed(model: Path, pictures: list[tuple[Path, Image.Image]], threshold: float) -> list[RoutedImage]:
    import torch

    from vico.checkpoints import load_model
    from vico.inference.routing import absolute_rule
    from vico.tiling import pixel_values

    routed_model: VicoModel = load_model(model)
    if routed_model.router is None:
        raise UserError(f"MODEL={model} has no router; give the folder that the export stage wrote")
    tiling = routed_model.settings.tiling()
    found = []
    for path, image in pictures:
        with torch.no_grad():
            features = routed_model.vision_features(torch.from_numpy(pixel_values(image, tiling)))
            p_compress = routed_model.router.compress_probability(features)
        compressed = absolute_rule(p_compress, threshold)
        found.append(RoutedImage(path, image, tuple(p_compress.tolist()), tuple(compressed.tolist())))
    return found


def tile_names(one: RoutedImage, settings: ModelSettings) -> list[str]:
    """`row 1, column 2` for each tile, `thumbnail` for the last where there is one."""
    columns, rows = tile_grid(*one.image.size, settings.tiling())
    names = [f"row {row + 1}, column {column + 1}" for row in range(rows) for column in range(columns)]
    return names + ["thumbnail"] * (len(one.compressed) - len(names))


def tokens(one: RoutedImage, settings: ModelSettings) -> list[int]:
    """Visual tokens of each tile."""
    return [settings.tokens_compressed if flag else settings.tokens_full for flag in one.compressed]


def as_object(one: RoutedImage, settings: ModelSettings, threshold: float) -> dict[str, Any]:
    """A routed picture for programs; boxes are (left, top, right, bottom) in pixels of the picture."""
    boxes = tile_boxes(*one.image.size, settings.tiling())
    counts, names = tokens(one, settings), tile_names(one, settings)
    full = len(counts) * settings.tokens_full
    return {
        "image": str(one.path),
        "width": one.image.width,
        "height": one.image.height,
        "threshold": threshold,
        "visual_tokens": sum(counts),
        "tokens_saved": 1 - sum(counts) / full,
        "tiles": [
            {
                "tile": tile,
                "name": names[tile],
                "thumbnail": names[tile] == "thumbnail",
                "box": boxes[tile],
                "p_compress": one.p_compress[tile],
                "compressed": one.compressed[tile],
                "tokens": counts[tile],
            }
            for tile in range(len(counts))
        ],
    }


def tiles_table(one: RoutedImage, settings: ModelSettings) -> Table:
    """A row a tile, the sum last."""
    counts = tokens(one, settings)
    full = len(counts) * settings.tokens_full
    table = Table("tile", "P(compress)", "tokens", box=None, pad_edge=False)
    for name, probability, flag, count in zip(
        tile_names(one, settings), one.p_compress, one.compressed, counts, strict=True
    ):
        table.add_row(name, f"{probability:.4f}", f"{count}{' (compressed)' if flag else ''}")
    table.add_row("all", "", f"{sum(counts)} of {full} ({1 - sum(counts) / full:.0%} saved)")
    return table


def drawing(routed: Sequence[RoutedImage], settings: ModelSettings) -> Image.Image:
    """All pictures with their tiles drawn, below each other."""
    from vico.inference.routed_picture import routed_picture

    drawn = [routed_picture(one.image, settings.tiling(), settings, one.compressed) for one in routed]
    height = sum(one.height for one in drawn) + _GAP * (len(drawn) - 1)
    sheet = Image.new("RGB", (max(one.width for one in drawn), height), "white")
    top = 0
    for one in drawn:
        sheet.paste(one, (0, top))
        top += one.height + _GAP
    return sheet


def _refuse_bad_place(out: Path) -> None:
    if out.suffix.lower() not in DRAWN_FORMATS:
        raise UserError(f"--out={out}: the name must end in one of {', '.join(DRAWN_FORMATS)}")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: the folder {out.parent} does not exist; create it first")


def _write(sheet: Image.Image, out: Path) -> None:
    try:
        sheet.save(out)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written ({error}); give another place") from error
