"""What a name or the first bytes of a file say about its kind: picture, audio, video, or something else."""

import re
from typing import Literal

Media = Literal["picture", "audio", "video"]

_ENDS: dict[Media, str] = {
    "picture": (
        "jpg jpeg jpe jfif png apng webp gif bmp dib tif tiff avif heic heif svg svgz jp2 j2k jpf jpx jxl psd "
        "ico cur icns xpm xbm ppm pgm pbm pnm tga pcx eps wmf emf exr hdr dds qoi xcf"
    ),
    "audio": "wav mp3 flac ogg oga opus m4a aac wma aif aiff amr mid midi",
    "video": "mp4 m4v avi mov mkv webm mpg mpeg wmv flv 3gp ogv",
}
_MEDIA_OF_END: dict[str, Media] = {end: media for media, ends in _ENDS.items() for end in ends.split()}
_READ_ENDS = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif"]
)
# (offset, bytes, name) of formats of pictures; those without a name are read
_PICTURE_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", ""),
    (0, b"\x89PNG\r\n\x1a\n", ""),
    (8, b"WEBP", ""),
    (0, b"GIF8", ""),
    (0, b"II*\0", ""),
    (0, b"MM\0*", ""),
    (4, b"ftypavi", ""),
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypmif", "HEIC"),
    (4, b"ftypmsf", "HEIC"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"8BPS", "PSD"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"\0\0\2\0", "CUR"),
    (0, b"icns", "ICNS"),
    (0, b"/* XPM", "XPM"),
    (0, b"! XPM", "XPM"),
    (0, b"gimp xcf", "XCF"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"%PDF", "PDF"),
    (0, b"v/1\1", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"\xd7\xcd\xc6\x9a", "WMF"),
    (0, b"AT&TFORM", "DjVu"),
    (128, b"DICM", "DICOM"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"II+\0", "BigTIFF"),
    (0, b"MM\0+", "BigTIFF"),
)
_NETPBM = re.compile(rb"P[1-7]\s")
_XBM = re.compile(rb"\s*#define\s+\w+_width\s")
_SVG = re.compile(rb"<(\w+:)?svg[\s>]", re.IGNORECASE)
_AUDIO_MAGIC = ((8, b"WAVE"), (0, b"ID3"), (0, b"fLaC"), (0, b"OggS"), (8, b"AIFF"), (4, b"ftypM4A"))
_VIDEO_MAGIC = ((4, b"ftyp"), (8, b"AVI "), (0, b"\x1aE\xdf\xa3"), (0, b"FLV\1"), (0, b"\0\0\1\xba"))
_PEEKED_BYTES = 4096


def name_end(name: str) -> str:
    """Return the lower-case extension of a file name or address, without its dot; "" if it has none."""
    last = name.rpartition("/")[2]
    if "://" in name:
        last = last.partition("?")[0].partition("#")[0]
    return last.rpartition(".")[2].lower() if "." in last else ""


def media_of_name(name: str) -> Media | None:
    """Return the kind that a file's extension stands for."""
    return _MEDIA_OF_END.get(name_end(name))


def media_of_bytes(data: bytes) -> Media | None:
    """Return the kind that a file's first bytes stand for."""
    if data.startswith(b"BM") and data[6:10] == b"\0\0\0\0":
        return "picture"
    if any(data.startswith(magic, offset) for offset, magic, _ in _PICTURE_MAGIC) or _text_picture(data):
        return "picture"
    if any(data.startswith(magic, offset) for offset, magic in _AUDIO_MAGIC):
        return "audio"
    return "video" if any(data.startswith(magic, offset) for offset, magic in _VIDEO_MAGIC) else None


def unread_format(data: bytes, name: str, reads_avif: bool) -> str | None:
    """Return the name of a picture format that is not read, by the bytes or, if they say nothing, the name."""
    if data.startswith(b"ftypavi", 4) and not reads_avif:
        return "AVIF, which needs Pillow 11.3"
    for offset, magic, format_name in _PICTURE_MAGIC:
        if data.startswith(magic, offset):
            return format_name or None
    by_text = _text_picture(data)
    if by_text:
        return by_text
    end = name_end(name)
    is_unread = _MEDIA_OF_END.get(end) == "picture" and end not in _READ_ENDS
    return end.upper() if is_unread else None


def _text_picture(data: bytes) -> str | None:
    """Return the name of a format of pictures that is written as text."""
    head = data[:_PEEKED_BYTES]
    if _NETPBM.match(head):
        return "Netpbm"
    if _SVG.search(head):
        return "SVG"
    return "XBM" if _XBM.match(head) else None
