"""`vico route`: the tiles of pictures that a model's router compresses, as a table, JSON and a drawing."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from PIL import Image
from rich.table import Table

from pipeline.commands.tables import console
from vico.errors import UserError, one_line
from vico.model_files import stored_threshold
from vico.settings import ModelSettings, load_settings
from vico.tiling import tile_boxes, tile_grid

if TYPE_CHECKING:
    from vico.model.internvl import VicoModel


DRAWN_FORMATS = (".png", ".jpg", ".jpeg", ".webp")
_GAP = 24
"""Pixels between pictures that are drawn below each other."""


@dataclass(frozen=True)
class RoutedImage:
    """A picture with the router's P(compress) and decision for each tile; the thumbnail is last."""

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
    """Print the tiles of each picture with their tokens; with `out` also draw all pictures into that file.

    A tile is compressed if P(compress) >= `threshold` (None: the model's own). Raises UserError for a model
    without a router, a picture that does not decode, and an `out` that is not writable.
    """
    if out is not None:
        _check_path(out)
    settings = load_settings(model)
    threshold = stored_threshold(model) if threshold is None else threshold
    opened = [opened_picture(path) for path in images]
    routed = _routed(model, list(zip(images, opened, strict=True)), threshold)
    if out is not None:
        _write(drawing(routed, settings), out)
    if as_json:
        objects = [as_object(picture, settings, threshold) for picture in routed]
        typer.echo(json.dumps(objects, ensure_ascii=False))
        return
    for picture in routed:
        size = f"{picture.image.width} x {picture.image.height}"
        title = f"{picture.path}: {size}, compressed from P(compress) {threshold:.4g} on"
        console().print(title, markup=False)
        console().print(tiles_table(picture, settings))
    if out is not None:
        console().print(f"drawn to {out}", markup=False)


def opened_picture(path: Path) -> Image.Image:
    """Return the picture as RGB. Raises UserError if it is missing or does not decode."""
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
        reason = one_line(error)
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
    routed = []
    for path, image in pictures:
        with torch.no_grad():
            features = routed_model.vision_features(torch.from_numpy(pixel_values(image, tiling)))
            p_compress = routed_model.router.compress_probability(features)
        compressed = absolute_rule(p_compress, threshold)
        routed.append(RoutedImage(path, image, tuple(p_compress.tolist()), tuple(compressed.tolist())))
    return routed


def tile_names(picture: RoutedImage, settings: ModelSettings) -> list[str]:
    """Return `row 1, column 2` for each tile, and `thumbnail` for the thumbnail, if there is one."""
    columns, rows = tile_grid(*picture.image.size, settings.tiling())
    names = [f"row {row + 1}, column {column + 1}" for row in range(rows) for column in range(columns)]
    return names + ["thumbnail"] * (len(picture.compressed) - len(names))


def tile_tokens(picture: RoutedImage, settings: ModelSettings) -> list[int]:
    """Return the number of visual tokens of each tile."""
    return [
        settings.tokens_compressed if compressed else settings.tokens_full
        for compressed in picture.compressed
    ]


def as_object(picture: RoutedImage, settings: ModelSettings, threshold: float) -> dict[str, Any]:
    """Return a routed picture as JSON types; a box is (left, top, right, bottom) in pixels of the picture."""
    boxes = tile_boxes(*picture.image.size, settings.tiling())
    counts, names = tile_tokens(picture, settings), tile_names(picture, settings)
    full = len(counts) * settings.tokens_full
    return {
        "image": str(picture.path),
        "width": picture.image.width,
        "height": picture.image.height,
        "threshold": threshold,
        "visual_tokens": sum(counts),
        "tokens_saved": 1 - sum(counts) / full,
        "tiles": [
            {
                "tile": tile,
                "name": names[tile],
                "thumbnail": names[tile] == "thumbnail",
                "box": boxes[tile],
                "p_compress": picture.p_compress[tile],
                "compressed": picture.compressed[tile],
                "tokens": counts[tile],
            }
            for tile in range(len(counts))
        ],
    }


def tiles_table(picture: RoutedImage, settings: ModelSettings) -> Table:
    """Return one row per tile, and the sum in the last row."""
    counts = tile_tokens(picture, settings)
    full = len(counts) * settings.tokens_full
    table = Table("tile", "P(compress)", "tokens", box=None, pad_edge=False)
    for name, probability, compressed, count in zip(
        tile_names(picture, settings), picture.p_compress, picture.compressed, counts, strict=True
    ):
        table.add_row(name, f"{probability:.4f}", f"{count}{' (compressed)' if compressed else ''}")
    table.add_row("all", "", f"{sum(counts)} of {full} ({1 - sum(counts) / full:.0%} saved)")
    return table


def drawing(routed: Sequence[RoutedImage], settings: ModelSettings) -> Image.Image:
    """Return one picture with all routed pictures below each other, their tiles drawn."""
    from vico.inference.routed_picture import routed_picture

    drawings = [
        routed_picture(picture.image, settings.tiling(), settings, picture.compressed) for picture in routed
    ]
    height = sum(image.height for image in drawings) + _GAP * (len(drawings) - 1)
    sheet = Image.new("RGB", (max(image.width for image in drawings), height), "white")
    top = 0
    for image in drawings:
        sheet.paste(image, (0, top))
        top += image.height + _GAP
    return sheet


def _check_path(out: Path) -> None:
    if out.suffix.lower() not in DRAWN_FORMATS:
        raise UserError(f"--out={out}: the name must end in one of {', '.join(DRAWN_FORMATS)}")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: the folder {out.parent} does not exist; create it first")


def _write(sheet: Image.Image, out: Path) -> None:
    try:
        sheet.save(out)
    except OSError as error:
        raise UserError(f"--out={out} is not writable ({error}); give another path") from error
