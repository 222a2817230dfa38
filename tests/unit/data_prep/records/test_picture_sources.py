"""Where the pictures of rows come from and which formats are read: base64, roots, links, metadata."""

import base64
import gzip
import io
import os
import zlib
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from data_prep.records.blocks import block_rows, record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.identity import records_fingerprint
from data_prep.records.pictures import checked_picture, picture_in_root
from data_prep.records.raw_rows import RawRow, picture_data
from data_prep.records.rejection import Rejected
from data_prep.records.sets import record_sets
from data_prep.shards.checks import checked_sample
from tests.odd_pictures import with_chunks, with_scans, with_segments
from tests.record_files import picture, row, write_lines, write_meta
from tests.record_samples import RULES
from vico.picture_files import MAX_JPEG_SCANS, MAX_JPEG_SEGMENTS, MAX_PNG_CHUNKS, open_picture

MOST_PIXELS = 10**6
HAS_AVIF = "avif" in features.get_supported_modules()


def check(data: bytes, name: str = "a", decode: bool = True):
    return checked_picture(data, name, max_pixels=MOST_PIXELS, decode=decode)


def absent(name: str) -> bytes:
    raise Rejected("missing_image", name[:100])


def data_of(name: str) -> bytes:
    return picture_data(RawRow(0, b"", False, absent), name)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pictures_in_the_row_itself_are_read(format):
    data = picture(1, format=format)
    text = base64.b64encode(data).decode()
    lines = "\n".join(text[n : n + 76] for n in range(0, len(text), 76))
    for name in (text, text.rstrip("="), lines, base64.urlsafe_b64encode(data).decode()):
        assert data_of(name) == data
    for head in (
        "data:image/x;base64",
        "DATA:IMAGE/X;BASE64",
        "data:;base64",
        "data:image/x;charset=utf-8;base64",
    ):
        assert data_of(f"{head},{text}") == data
    assert data_of(f"data:image/x;base64,{quote(text, safe='')}") == data
    assert data_of("data:image/svg+xml,%3Csvg/%3E") == b"<svg/>"


@pytest.mark.parametrize(
    "name, reason",
    [
        ("data:image/png;base64,iVBORw0KGgo*" + "x" * 50_000, "undecodable_image"),
        ("data:image/png;base64", "undecodable_image"),
        (base64.b64encode(picture(1)).decode()[:100] + "*" * 50_000, "undecodable_image"),
        (base64.b64encode(bytes(range(256)) * 150).decode(), "undecodable_image"),
        ("A" * 50_001, "missing_image"),
        ("folder/" * 20 + "a.png", "missing_image"),
        ("0123456789abcdef" * 4, "missing_image"),
        ("x" * 70_000 + ".png", "missing_image"),
    ],
    ids=["damaged", "no data", "cut", "no picture", "repeats", "path", "hexadecimal", "long name"],
)
def test_a_name_that_is_neither_a_file_nor_a_picture_is_cut_in_the_message(tmp_path, name, reason):
    raw = RawRow(0, b"", False, lambda name: picture_in_root(tmp_path, name))
    with pytest.raises(Rejected) as caught:
        check(picture_data(raw, name), name)
    assert (
        caught.value.reason == reason and len(caught.value.message) < 400 and "\n" not in caught.value.message
    )


def test_absolute_paths_and_file_addresses_are_read_below_the_root(tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "a b.png").write_bytes(b"a")
    path = str(tmp_path / "pics" / "a b.png")
    for root in (tmp_path, tmp_path / "pics", Path("/")):
        assert picture_in_root(root, path) == b"a"
        assert picture_in_root(root, "file://" + path.replace(" ", "%20")) == b"a"
        with pytest.raises(Rejected, match=r"/ holds all|not in its root") as caught:
            picture_in_root(root, "../x/a.png")
        assert "root" in caught.value.message
    with pytest.raises(Rejected, match="set root to a folder that holds the picture") as caught:
        picture_in_root(tmp_path / "pics", str(tmp_path / "b.png"))
    assert caught.value.reason == "path_outside_root"
    with pytest.raises(Rejected, match="is not downloaded") as caught:
        picture_in_root(tmp_path, "https://x.org/a.png")
    assert caught.value.reason == "missing_image"


def test_the_root_of_a_meta_file_may_be_the_whole_disk(tmp_path, prompt_format):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "a.png").write_bytes(picture(1))
    write_lines(tmp_path / "meta" / "a.jsonl", [row(str(tmp_path / "pics" / "a.png"))])
    for root, reason in (("", "path_outside_root"), ("/", None), (str(tmp_path), None)):
        config = RecordsConfig(format="internvl", path=write_meta(tmp_path / "meta", a={"root": root}))
        (block,) = record_blocks(record_sets(config), 5)
        (raw,) = block_rows(block)
        if reason is None:
            assert checked_sample(raw, RULES, prompt_format).pictures
            continue
        with pytest.raises(Rejected) as caught:
            checked_sample(raw, RULES, prompt_format)
        assert caught.value.reason == reason


def test_links_lead_out_of_the_root_only_if_the_config_says_so(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.png").write_bytes(b"a")
    (tmp_path / "data").mkdir()
    os.symlink("../disk", tmp_path / "data" / "coco")
    os.symlink("../disk/a.png", tmp_path / "data" / "link.png")
    write_lines(tmp_path / "data" / "rows.jsonl", [row("coco/a.png")])
    for name in ("coco/a.png", "link.png"):
        with pytest.raises(Rejected, match="follow_links: true") as caught:
            picture_in_root(tmp_path / "data", name)
        assert caught.value.reason == "path_outside_root"
        assert picture_in_root(tmp_path / "data", name, follow_links=True) == b"a"
    for name in ("../disk/a.png", "coco/../../disk/a.png", str(tmp_path / "disk" / "a.png")):
        with pytest.raises(Rejected) as caught:
            picture_in_root(tmp_path / "data", name, follow_links=True)
        assert caught.value.reason == "path_outside_root"
    (tmp_path / "data" / "b.png").write_bytes(b"own")
    (tmp_path / "b.png").write_bytes(b"outside")
    for name in ("coco/../b.png", str(tmp_path / "data" / "coco" / ".." / "b.png")):
        assert picture_in_root(tmp_path / "data", name, follow_links=True) == b"own", "the name is inside"
    config = RecordsConfig(format="llava", path=tmp_path / "data" / "rows.jsonl")
    followed = config.model_copy(update={"follow_links": True})
    (block,) = record_blocks(record_sets(followed), 5)
    assert next(block_rows(block)).picture_bytes("coco/a.png") == b"a"
    assert records_fingerprint(followed) != records_fingerprint(config)


def test_pictures_are_beside_the_annotation_also_if_it_is_a_link(tmp_path):
    """As in the Hub's cache, where the files of a snapshot are links to blobs."""
    for folder in ("blobs", "snapshot/images"):
        (tmp_path / folder).mkdir(parents=True)
    write_lines(tmp_path / "blobs" / "0a1b", [row("images/a.png")])
    (tmp_path / "snapshot" / "rows.jsonl").symlink_to("../blobs/0a1b")
    (tmp_path / "snapshot" / "images" / "a.png").write_bytes(b"a")
    (block,) = record_blocks(record_sets(RecordsConfig(format="llava", path=tmp_path / "snapshot")), 5)
    assert next(block_rows(block)).picture_bytes("images/a.png") == b"a"


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_whose_range_is_unknown_are_refused_and_not_cut_off(mode):
    data = io.BytesIO()
    Image.new(mode, (8, 8), 1).save(data, "TIFF")
    with pytest.raises(Rejected, match="scale them to 8 bits") as caught:
        checked_picture(data.getvalue(), "a.tif", max_pixels=1000, decode=False)
    assert caught.value.reason == "picture_format"


@pytest.mark.parametrize(
    "data, words",
    [
        (with_scans(MAX_JPEG_SCANS), "scans"),
        (with_segments(MAX_JPEG_SEGMENTS), "segments"),
        (with_chunks(MAX_PNG_CHUNKS), "chunks"),
    ],
    ids=["scans", "segments", "chunks"],
)
def test_a_file_that_takes_far_more_than_its_pixels_need_is_refused(data, words):
    with pytest.raises(Rejected, match=words) as caught:
        check(data)
    assert caught.value.reason == "undecodable_image"


def test_more_formats_are_read_and_of_several_frames_the_first():
    first, second = (Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (200, 20))
    for format, extension in (("GIF", "gif"), ("TIFF", "tif"), ("WEBP", "webp"), ("PNG", "png")):
        stream = io.BytesIO()
        first.save(stream, format, save_all=True, append_images=[second])
        checked = check(stream.getvalue())
        assert (checked.extension, checked.width, checked.height) == (extension, 30, 20)
        pixel = np.asarray(open_picture(checked.data).convert("RGB"))[0, 0]
        assert abs(int(pixel[0]) - 200) < 8, format
    assert check(picture(1, format="BMP")).extension == "bmp"
    if HAS_AVIF:
        assert check(picture(1, format="AVIF")).extension == "avif"
    for format in ("GIF", "BMP", "TIFF"):
        with pytest.raises(Rejected) as caught:
            check(picture(1, (200, 200), format)[:200])
        assert caught.value.reason == "undecodable_image", format


@pytest.mark.parametrize(
    "data, reason, words",
    [
        (b"\0\0\0\x18ftypisom", "video", "is a video, not a picture"),
        (b"RIFF\0\0\0\0WAVEfmt ", "audio", "is audio, not a picture"),
        (picture(1)[:12], "undecodable_image", "its header is damaged"),
        (b"words", "undecodable_image", "not a picture"),
        (b"", "undecodable_image", "empty"),
    ],
)
def test_a_file_that_is_no_picture_says_what_it_is(data, reason, words):
    with pytest.raises(Rejected, match=words) as caught:
        check(data, "a.jpg")
    assert caught.value.reason == reason


OTHER_FORMATS = {
    "a.xpm": b'/* XPM */\nstatic char *a[] = {"1 1 1 1"};',
    "a.ico": b"\0\0\1\0\1\0" + bytes(40),
    "a.svg": b'<?xml version="1.0"?>\n<!-- made by hand -->\n<!DOCTYPE svg>\n<svg width="1"></svg>',
    "no_name": b'\xef\xbb\xbf<svg xmlns="http://www.w3.org/2000/svg"/>',
    "text.svg": b"not a picture, and named like one",
    "a.svgz": gzip.compress(b"<svg/>"),
    "A.SVGZ": gzip.compress(b"<svg/>"),
    "zipped.svg": gzip.compress(b"<svg/>"),
    "wide.svg": "<svg/>".encode("utf-16"),
    "a.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
    "a.psd": b"8BPS\0\1" + bytes(40),
    "a.heic": b"\0\0\0\x18ftypheic" + bytes(40),
    "a.ppm": b"P6\n1 1\n255\nabc",
    "a.xbm": b"#define a_width 8\n#define a_height 8\n",
    "a.eps": b"%!PS-Adobe-3.0 EPSF-3.0",
    "a.pdf": b"%PDF-1.7",
    "a.tga": bytes(40),
    "b.tga": b"\0\0\2" + bytes(40),
    "a.sgi": b"\x01\xda\0\1" + bytes(40),
    "a.jxr": b"II\xbc\x01" + bytes(40),
    "b.svg": b"<?xml version='1.0'?><!--" + b" " * 9000 + b"--><svg/>",
    "c.png": b"<?xml version='1.0'?><!--" + b" " * 9000 + b"--><svg/>",
    "a.jxl": b"\xff\x0a" + bytes(40),
    "a.qoi": b"qoif" + bytes(40),
    "ls.jpg": b"\xff\xd8\xff\xf7\0\x0b\x08" + bytes(40),
    "a.cr2": b"II*\0\x10\0\0\0CR\x02\0" + bytes(40),
    "a.cr3": b"\0\0\0\x18ftypcrx " + bytes(40),
    "no_name_of_a_camera": b"IIU\0" + bytes(40),
    "a.mng": b"\x8aMNG\r\n\x1a\n" + bytes(40),
    "a.icns": b"icns" + bytes(40),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
@pytest.mark.parametrize("decode", [True, False])
def test_sound_pictures_of_other_formats_are_not_called_damaged(name, decode):
    with pytest.raises(Rejected) as caught:
        check(OTHER_FORMATS[name], name, decode)
    assert caught.value.reason == "picture_format" and "JPEG, PNG" in caught.value.message


@pytest.mark.parametrize(
    "data, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html><svg></svg>404</html>", "an HTML page"),
        (b"this is not a picture", "not a picture"),
    ],
)
def test_files_that_are_no_pictures_are_named(data, words):
    with pytest.raises(Rejected, match=words) as caught:
        check(data, "a.jpg")
    assert caught.value.reason == "undecodable_image"


def large_metadata(kind: str) -> bytes:
    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    info, options = PngImagePlugin.PngInfo(), {}
    if kind == "icc":
        options["icc_profile"] = bytes(3 << 20)
    elif kind == "many":
        for n in range(80):
            info.add_text(f"t{n}", "x" * 1_000_000)
    else:
        info.add_text("t", "x" * (3 << 20), zip=kind == "zip")
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=info, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["text", "zip", "icc", "many", "after the pixels"])
def test_a_png_with_much_metadata_is_read_with_the_same_pixels(kind):
    data = large_metadata("zip" if kind == "after the pixels" else kind)
    if kind == "after the pixels":
        end = data.rindex(b"\0\0\0\0IEND")
        text = b"zTXtt\0\0" + zlib.compress(bytes(3 << 20))
        chunk = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
        data = data[:end] + chunk + data[end:]
    for decode in (True, False):
        checked = check(data, decode=decode)
        assert checked.data == data and (checked.width, checked.height) == (5, 4)
    image = open_picture(data)
    assert np.array_equal(np.asarray(image.convert("RGB")).ravel(), np.arange(60))


def test_damage_of_a_png_is_found_beside_its_metadata():
    data = large_metadata("icc")
    with pytest.raises(Rejected) as caught:
        check(data[:-40])
    assert caught.value.reason == "undecodable_image"
