"""`vico route`: the tiles of pictures that a model's router compresses, as tables, JSON and drawings."""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from pipeline.commands.tables import text_table
from pipeline.terminal.output import print_json, terminal
from pipeline.terminal.tables import TextTable
from vico.errors import UserError, one_line
from vico.inference.devices import usable_device
from vico.model_files import stored_threshold
from vico.picture_files import open_picture
from vico.settings import ModelSettings, load_settings
from vico.tiling import tile_boxes, tile_grid

if TYPE_CHECKING:
    from vico.model.internvl import VicoModel

_PICTURE_NAME = re.compile(
    r".+\.(avif|bmp|gif|heic|jfif|jp2|jpe|jpeg|jpg|png|svg|tiff?|webp)", re.IGNORECASE | re.DOTALL
)
"""The files of a folder that are pictures; which of them can be read, `checked_picture` says."""


@dataclass(frozen=True)
class Placement:
    """The device of the model and the type of its weights, as options of a command gave them."""

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"


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
    placement: Placement = Placement(),
) -> None:
    """Print the tiles of each picture with their tokens; with `out` also draw the pictures there.

    A tile is compressed if P(compress) >= `threshold` (None: the model's own). A folder stands for the
    pictures in it. One picture at a time is in memory. Raises UserError, before anything is routed, for a
    device that is not here, a model without a router, pictures that the shard stage would refuse, and an
    `out` that is not writable.
    """
    from pipeline.commands.drawings import drawings
    from vico.inference.routed_picture import routed_picture

    usable_device(placement.device, "--device")
    settings = load_settings(model)
    threshold = stored_threshold(model) if threshold is None else threshold
    paths = picture_files(images)
    check_pictures(paths)
    drawn = None if out is None else drawings(out, paths)
    objects = []
    for picture in _routed(model, paths, threshold, placement):
        if drawn is not None:
            decisions = picture.compressed
            drawing = routed_picture(picture.image, settings.tiling(), settings, decisions, drawn.long_side)
            drawn.add(picture.path, drawing)
        if as_json:
            objects.append(as_object(picture, settings, threshold))
        else:
            size = f"{picture.image.width} x {picture.image.height}"
            title = f"{picture.path}: {size}, compressed from P(compress) {threshold:.4g} on"
            terminal().line(title)
            terminal().table(tiles_table(picture, settings))
    if drawn is not None:
        drawn.close()
    if as_json:
        print_json(sys.stdout, objects)
    elif out is not None:
        terminal().line(f"drawn to {out}")


def picture_files(images: Sequence[Path]) -> list[Path]:
    """Return the files, with the pictures in each folder and its subfolders, sorted, instead of the folder.

    Raises UserError for a folder without one.
    """
    paths: list[Path] = []
    for image in images:
        if not image.is_dir():
            paths.append(image)
            continue
        found = sorted(
            path for path in image.rglob("*") if _PICTURE_NAME.fullmatch(path.name) and path.is_file()
        )
        if not found:
            raise UserError(
                f"IMAGE={image} is a folder without a picture; give pictures, or a folder of them"
            )
        paths += found
    return paths


def check_pictures(paths: Sequence[Path]) -> None:
    """Raise UserError with a line for each picture that is missing or that the shard stage would refuse."""
    problems = []
    for path in dict.fromkeys(paths):
        try:
            picture_bytes(path)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def picture_bytes(path: Path) -> bytes:
    """Return the bytes of a picture that passes the shard stage's checks.

    Raises UserError if it is missing, too large (the default of `shard.max_pixels`) or does not decode.
    """
    from data_prep.records.pictures import checked_picture
    from data_prep.records.rejection import Rejected
    from stages.shard.config import ShardConfig

    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"IMAGE={path} does not exist; give the path of a picture") from error
    except OSError as error:
        raise UserError(f"IMAGE={path} is not readable ({error.strerror}); give another picture") from error
    try:
        return checked_picture(data, path.name, max_pixels=ShardConfig().max_pixels, decode=True).data
    except Rejected as error:
        verb = "does not decode" if error.reason == "undecodable_image" else "is refused"
        reason = f"{error.reason}: {one_line(error.message)}"
        raise UserError(
            f"IMAGE={path} {verb} ({reason}); give a picture that the shard stage takes"
        ) from error


def _routed(
    model: Path, paths: Sequence[Path], threshold: float, placement: Placement
) -> Iterator[RoutedImage]:
    """Yield the pictures with their decisions, one at a time."""
    import torch

    from vico.checkpoints import load_model
    from vico.inference.routing import absolute_rule
    from vico.tiling import pixel_values

    routed_model: VicoModel = load_model(model, getattr(torch, placement.dtype), placement.device)
    if routed_model.router is None:
        raise UserError(f"MODEL={model} has no router; give the folder that the export stage wrote")
    tiling = routed_model.settings.tiling()
    for path in paths:
        with open_picture(picture_bytes(path)) as opened:
            image = opened.convert("RGB")
        with torch.no_grad():
            features = routed_model.vision_features(
                torch.from_numpy(pixel_values(image, tiling)).to(placement.device)
            )
            p_compress = routed_model.router.compress_probability(features).cpu()
        compressed = absolute_rule(p_compress, threshold)
        yield RoutedImage(path, image, tuple(p_compress.tolist()), tuple(compressed.tolist()))


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


def tiles_table(picture: RoutedImage, settings: ModelSettings) -> TextTable:
    """Return one row per tile, and the sum in the last row."""
    counts = tile_tokens(picture, settings)
    full = len(counts) * settings.tokens_full
    rows = [
        (name, f"{probability:.4f}", f"{count}{' (compressed)' if compressed else ''}")
        for name, probability, compressed, count in zip(
            tile_names(picture, settings), picture.p_compress, picture.compressed, counts, strict=True
        )
    ]
    total = ("all", "", f"{sum(counts)} of {full} ({1 - sum(counts) / full:.0%} saved)")
    return text_table(("tile", "P(compress)", "tokens"), [*rows, total])
