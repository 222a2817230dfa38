"""`vico route`: its table, JSON and drawing, and its errors for bad input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.checkpoints.save import save_model
from vico.errors import UserError
from vico.tiling import pixel_values


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture(scope="module")
def routed(base, tmp_path_factory):
    """A model folder with connector, router and threshold."""
    model = load_model(base)
    model.add_compressed_connector(1)
    model.add_router(2)
    with torch.no_grad():  # so that decisions differ between tiles
        model.router.gating.gate[1].weight.mul_(30)
    folder = tmp_path_factory.mktemp("routed") / "model"
    save_model(model.state_dict(), base, folder, {"absolute_threshold": 0.5})
    return folder


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (130, 190, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def route(*arguments):
    return CliRunner().invoke(app, ["route", *map(str, arguments)])


def test_json_has_the_decisions_of_the_router(routed, picture):
    (shown,) = json.loads(route(routed, picture, "--json").stdout)
    model = load_model(routed)
    with torch.no_grad():
        pixels = torch.from_numpy(pixel_values(Image.open(picture), model.settings.tiling()))
        expected = model.router.compress_probability(model.vision_features(pixels)).tolist()
    tiles = shown["tiles"]
    assert [tile["p_compress"] for tile in tiles] == pytest.approx(expected)
    assert [tile["compressed"] for tile in tiles] == [p >= 0.5 for p in expected]
    assert [tile["tokens"] for tile in tiles] == [1 if p >= 0.5 else 4 for p in expected]
    assert shown["visual_tokens"] == sum(tile["tokens"] for tile in tiles)
    assert shown["tokens_saved"] == 1 - shown["visual_tokens"] / (4 * len(tiles))
    assert tiles[-1]["thumbnail"] and tiles[-1]["box"] == [0, 0, 190, 130]
    assert not any(tile["thumbnail"] for tile in tiles[:-1])


def test_a_threshold_on_the_command_line_replaces_the_models(routed, picture):
    for threshold, expected in ((0, True), (1, False)):
        (shown,) = json.loads(route(routed, picture, "--json", "--threshold", threshold).stdout)
        assert {tile["compressed"] for tile in shown["tiles"]} == {expected}


def test_a_table_and_a_drawing_without_json(routed, picture, tmp_path):
    out = tmp_path / "drawn.png"
    printed = route(routed, picture, picture, "--out", out).stdout
    assert "row 1, column 1" in printed and "thumbnail" in printed and str(out) in printed
    with Image.open(out) as image:
        assert image.height > 2 * 300


@pytest.mark.parametrize(
    "data, message",
    [(None, "does not exist"), (b"\x89PNG\r\n\x1a\n broken", "does not decode"), (b"", "does not decode")],
)
def test_a_picture_that_is_missing_or_does_not_decode_is_refused(routed, tmp_path, data, message):
    path = tmp_path / "bad.png"
    if data is not None:
        path.write_bytes(data)
    error = route(routed, path).exception
    assert isinstance(error, UserError) and message in str(error) and "bad.png" in str(error)
    assert "\n" not in str(error)


def test_a_truncated_picture_is_refused(routed, picture):
    picture.write_bytes(picture.read_bytes()[:-2000])
    assert "does not decode" in str(route(routed, picture).exception)


def test_a_model_without_router_or_threshold_is_refused(base, routed, picture, tmp_path):
    assert "no vico.absolute_threshold" in str(route(base, picture).exception)
    assert "has no router" in str(route(base, picture, "--threshold", 0.5).exception)
    assert isinstance(route(tmp_path / "nowhere", picture).exception, UserError)


def test_a_path_that_cannot_be_drawn_to_is_refused(routed, picture, tmp_path):
    assert "must end in" in str(route(routed, picture, "--out", tmp_path / "a.txt").exception)
    assert "does not exist" in str(route(routed, picture, "--out", tmp_path / "no" / "a.png").exception)
