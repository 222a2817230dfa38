"""`vico route`: its table, JSON and drawing, and its errors for bad input."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from pipeline.cli import app
from tests.tiny_model import make_tiny_model
from tests.waiting import PATIENCE_S
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


def test_route_takes_a_device_and_a_type(routed, picture):
    whole, half = (
        json.loads(route(routed, picture, "--json", "--dtype", dtype, "--device", "cpu").stdout)[0]
        for dtype in ("float32", "bfloat16")
    )
    p_whole, p_half = ([tile["p_compress"] for tile in shown["tiles"]] for shown in (whole, half))
    assert p_half != p_whole
    assert p_half == pytest.approx(p_whole, abs=0.1)
    refused = route(routed, picture, "--device", "cuda")
    assert str(refused.exception).startswith("--device=cuda: torch sees no CUDA device here")


def test_a_table_and_a_drawing_without_json(routed, picture, tmp_path):
    out = tmp_path / "drawn.png"
    printed = route(routed, picture, "--out", out).stdout
    assert "row 1, column 1" in printed and "thumbnail" in printed and str(out) in printed
    with Image.open(out) as image:
        assert image.height > 300


@pytest.mark.parametrize("suffix", [".webp", ".png", ".jpg"])
def test_several_pictures_are_a_grid_in_one_file(routed, picture, tmp_path, suffix):
    tall = tmp_path / "tall.png"
    Image.new("RGB", (40, 3000)).save(tall)
    out = tmp_path / f"drawn{suffix}"
    result = route(routed, *[tall, picture] * 10, "--out", out)
    assert result.exit_code == 0, result.exception
    with Image.open(out) as image:
        assert max(image.size) <= 16_383, "the most that WebP allows"
        assert 0.5 < image.width / image.height < 2, "not one column"


def test_one_file_per_picture_in_a_folder(routed, picture, tmp_path):
    (tmp_path / "more").mkdir()
    other = tmp_path / "more" / "picture.jpg"
    Image.new("RGB", (60, 60)).save(other)
    out = tmp_path / "drawn"
    assert str(out) in route(routed, picture, other, "--out", out).stdout
    assert sorted(path.name for path in out.iterdir()) == ["picture-2.png", "picture.png"]
    assert route(routed, picture, "--out", out).exit_code == 0, "drawings may be replaced"


def test_a_folder_stands_for_its_pictures(routed, picture, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    (folder / "notes.txt").write_text("not a picture")
    picture.rename(folder / "b.PNG")
    Image.new("RGB", (60, 60)).save(folder / "inner" / "a.jpg")
    shown = json.loads(route(routed, folder, "--json").stdout)
    assert [entry["image"] for entry in shown] == [str(folder / "b.PNG"), str(folder / "inner" / "a.jpg")]
    (tmp_path / "empty").mkdir()
    assert "is a folder without a picture" in str(route(routed, tmp_path / "empty").exception)


@pytest.mark.parametrize("size", [(1, 600), (600, 1), (3, 3), (2, 9000)])
def test_extreme_pictures_are_drawn(routed, tmp_path, size):
    path = tmp_path / "thin.png"
    Image.new("RGB", size).save(path)
    for images in ([path], [path] * 2):
        result = route(routed, *images, "--out", tmp_path / "drawn.png")
        assert result.exit_code == 0, result.exception


def test_a_picture_over_the_sharders_limit_is_refused_before_any_model_is_loaded(routed, picture, tmp_path):
    large, broken = tmp_path / "large.png", tmp_path / "broken.png"
    Image.new("1", (14_000, 12_000)).save(large)
    broken.write_bytes(picture.read_bytes()[:-2000])
    (routed / "model.safetensors").rename(tmp_path / "away")
    (routed / "model.safetensors").touch()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = str(route(routed, picture, large, broken, large).exception)
    finally:
        (tmp_path / "away").rename(routed / "model.safetensors")
    first, second = error.splitlines()
    assert "large.png is refused (too_many_pixels" in first and "14000 x 12000" in first
    assert "broken.png does not decode" in second


def test_a_png_with_a_large_text_is_routed(routed, tmp_path):
    """Pillow refuses to read such a text, and no pixel depends on it."""
    info = PngInfo()
    info.add_text("workflow", "x" * 2**21, zip=True)
    Image.new("RGB", (60, 60)).save(tmp_path / "text.png", pnginfo=info)
    result = route(routed, tmp_path / "text.png")
    assert result.exit_code == 0, result.output


def test_pillows_warnings_do_not_reach_the_terminal(routed, tmp_path):
    large = tmp_path / "large.png"
    Image.new("1", (14_000, 12_000)).save(large)
    command = [sys.executable, "-m", "pipeline.cli", "route", str(routed), str(large)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: IMAGE=")


def test_no_more_pictures_are_in_memory_than_one(routed, tmp_path):
    """Each picture takes 18 MB decoded; all together would take 200 MB more than one."""
    paths = [tmp_path / f"{n}.jpg" for n in range(12)]
    for path in paths:
        Image.new("RGB", (3000, 2000)).save(path)
    peaks = [_peak_bytes(["route", str(routed), *map(str, paths[:n]), "--json"]) for n in (1, 12)]
    assert peaks[1] - peaks[0] < 100 << 20


def _peak_bytes(arguments: list[str]) -> int:
    probe = """
import resource, sys
from pipeline.cli import main
main_exit = None
try:
    main()
except SystemExit as ended:
    main_exit = ended.code
print(main_exit, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""
    command = [sys.executable, "-c", probe, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    code, peak_kib = result.stderr.splitlines()[-1].split()
    assert code in ("None", "0"), result.stderr
    return int(peak_kib) << 10


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
    missing = route(tmp_path / "nowhere", picture).exception
    assert isinstance(missing, UserError) and str(missing).startswith(
        f"model={tmp_path}/nowhere is not a folder"
    )


def test_a_path_that_cannot_be_drawn_to_is_refused(routed, picture, tmp_path):
    def refusal(out, *pictures):
        error = route(routed, *pictures or [picture], "--out", out).exception
        assert isinstance(error, UserError) and "\n" not in str(error)
        return str(error)

    assert "must end in" in refusal(tmp_path / "a.txt")
    assert "does not exist" in refusal(tmp_path / "no" / "a.png")
    assert "does not exist" in refusal(tmp_path / "no" / "folder")
    assert "is one of the pictures" in refusal(picture)
    assert "is one of the pictures" in refusal(tmp_path)
    assert "give the name of a folder" in refusal(tmp_path / "a.png", *[picture] * 145)
    assert "is not writable" in refusal(picture / "folder") or "does not exist" in refusal(picture / "folder")
