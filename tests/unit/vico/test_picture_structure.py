"""Pictures that ask for more time or memory than their pixels need are refused before they are decoded."""

import io

import pytest
from PIL import Image

from tests.odd_pictures import encoded, with_chunks, with_scans, with_segments
from vico.picture_files import MAX_JPEG_SCANS, MAX_JPEG_SEGMENTS, MAX_PNG_CHUNKS, check_structure


@pytest.mark.parametrize(
    "data",
    [
        *(encoded("JPEG", progressive=progressive, quality=98) for progressive in (False, True)),
        encoded("JPEG", restart_marker_blocks=1),
        encoded("JPEG", icc_profile=bytes(300_000)) + b"\xff\xda" * 200,  # a film behind the picture
        encoded("PNG"),
        encoded("WEBP"),
        with_scans(MAX_JPEG_SCANS // 2),
        with_segments(MAX_JPEG_SEGMENTS - 100),
        with_chunks(MAX_PNG_CHUNKS - 100),
        encoded("JPEG")[:200],
        encoded("PNG")[:50],
        b"\xff\xd8",
        b"",
    ],
    ids=range(13),
)
def test_pictures_of_real_encoders_and_damaged_ones_pass(data):
    check_structure(data)


@pytest.mark.parametrize(
    "data, named",
    [
        (with_scans(MAX_JPEG_SCANS), "scans"),
        (with_segments(MAX_JPEG_SEGMENTS), "segments"),
        (with_chunks(MAX_PNG_CHUNKS), "chunks"),
    ],
    ids=["scans", "segments", "chunks"],
)
def test_pictures_of_many_scans_segments_or_chunks_are_refused(data, named):
    assert Image.open(io.BytesIO(data)).size == (48, 64), "it is a picture"
    with pytest.raises(ValueError, match=f"more than .* {named}"):
        check_structure(data)
