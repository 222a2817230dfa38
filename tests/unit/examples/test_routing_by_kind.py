"""The table of kept and compressed tiles by kind of picture."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from examples.routing_by_kind import character_width, line_kinds, main, tile_kinds, wilson_interval
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.checkpoints.save import save_model
from vico.tiling import Tiling, tile_pixels

ROOT = Path(__file__).parents[3]


def test_tiles_without_content_are_counted_by_themselves():
    tiles = np.stack([np.full((3, 8, 8), level, np.uint8) for level in (255, 128, 0)] + [striped()])
    assert tile_kinds(tiles, "photo") == ["white tile", "blank tile", "blank tile", "photo"]


def test_a_uniform_colour_is_blank():
    colour = np.broadcast_to(np.array([200, 30, 90], np.uint8)[:, None, None], (3, 8, 8))
    assert tile_kinds(colour[None], "photo") == ["blank tile"]


def test_a_line_is_legible_where_its_characters_are_wide_enough_and_only_where_it_is():
    """Ten characters on 154 px: 7.7 px each in the first tile, 3.9 px in the thumbnail."""
    picture = Image.new("RGB", (400, 200), "white")
    pen = ImageDraw.Draw(picture)
    for x in range(20, 180, 16):
        pen.rectangle((x, 40, x + 9, 60), fill="black")
    tiling = Tiling(min_tiles=1, max_tiles=2, tile_size=100)
    pixels = tile_pixels(picture, tiling)
    assert line_kinds(picture, "a" * 10, tiling, pixels) == [
        "legible line",
        "beside a line",
        "illegible line",
    ]
    assert line_kinds(picture, "a" * 30, tiling, pixels)[0] == "illegible line"


def test_the_gap_of_a_header_makes_its_characters_no_wider():
    """Four characters of 12 px at the left and two at the right, 300 px apart; a space is 12 px."""
    picture = Image.new("RGB", (400, 200), "white")
    pen = ImageDraw.Draw(picture)
    for x in (0, 12, 36, 48, 360, 372):
        pen.rectangle((x, 40, x + 11, 60), fill="black")
    assert character_width(picture, "ab cd 72") == 12.0
    assert character_width(picture.crop((0, 0, 100, 200)), "ab cd") == 12.0
    assert character_width(Image.new("RGB", (40, 20), "white"), "ab") == 0.0


def striped() -> np.ndarray:
    return np.tile(np.array([0, 255], np.uint8), (3, 8, 4))


def test_the_interval_of_a_share_stays_between_0_and_1():
    low, high = wilson_interval(40, 40)
    assert 0.9 < low < high == pytest.approx(1)
    low, high = wilson_interval(20, 40)
    assert low < 0.5 < high and high - low == pytest.approx(0.3, abs=0.02)


def test_the_table_counts_every_tile_of_every_picture(tmp_path):
    start = make_tiny_model(tmp_path / "start")
    with pytest.raises(SystemExit, match="has no router"):
        main([str(start), str(tmp_path), "--threshold", "0.5"])
    with pytest.raises(SystemExit, match=rf"^MODEL={tmp_path} has no config\.json; "):
        main([str(tmp_path), str(tmp_path)])
    model = load_model(start)
    model.add_compressed_connector(1)
    model.add_router(2)
    save_model(model.state_dict(), start, tmp_path / "model")
    for kind, level in (("paper", 255), ("page", 90)):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        Image.new("RGB", (56, 56), (level,) * 3).save(tmp_path / "pictures" / kind / "a.png")
    Image.fromarray(np.tile(striped().transpose(1, 2, 0), (7, 7, 1))).save(
        tmp_path / "pictures" / "page" / "b.png"
    )
    command = [sys.executable, "-m", "examples.routing_by_kind", tmp_path / "model", tmp_path / "pictures"]
    options = ["--json", "--threshold", "0"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = {row["kind"]: (row["tiles"], row["compressed"]) for row in json.loads(done.stdout)}
    assert rows == {"white tile": (1, 1), "blank tile": (1, 1), "page": (1, 1)}
