"""What a name or the first bytes of a file say about its kind: picture, audio, video, or something else."""

import re
from typing import Literal

Media = Literal["picture", "audio", "video"]

_ENDS: dict[Media, str] = {
    "picture": (
        "jpg jpeg jpe jfif png apng webp gif bmp dib tif tiff avif heic heif svg svgz jp2 j2k jpf jpx jxl "
        "psd ico cur icns sgi blp jxr wdp dcm fits xpm xbm ppm pgm pbm pnm tga "
        "pcx eps wmf emf exr hdr dds qoi xcf psb mng jng flif bpg ktx jls "
        "cr2 cr3 crw nef arw dng orf rw2 raf pef srw"
    ),
    "audio": "wav mp3 flac ogg oga opus m4a aac wma aif aiff amr mid midi",
    "video": "mp4 m4v avi mov mkv webm mpg mpeg wmv flv 3gp ogv",
}
_MEDIA_OF_END: dict[str, Media] = {end: media for media, ends in _ENDS.items() for end in ends.split()}
_READ_ENDS = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif"]
)
# raw pictures of cameras, most of them in the form of a TIFF
_RAW_ENDS = frozenset(("cr2", "nef", "arw", "dng", "orf", "pef", "srw"))
# (offset, bytes, name) of formats of pictures; those without a name are read
_PICTURE_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff\xf7", "JPEG-LS"),
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
    (4, b"ftypcrx", "CR3"),
    (0, b"IIU\0", "RW2"),
    (0, b"IIRO", "ORF"),
    (0, b"FUJIFILMCCD-RAW", "RAF"),
    (0, b"\x8aMNG", "MNG"),
    (0, b"\x8bJNG", "JNG"),
    (0, b"FLIF", "FLIF"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"\xabKTX", "KTX"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"8BPS", "PSD"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"icns", "ICNS"),
    (0, b"\x01\xda", "SGI"),
    (0, b"BLP1", "BLP"),
    (0, b"BLP2", "BLP"),
    (0, b"II\xbc", "JPEG XR"),
    (0, b"Image type:", "IM"),
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
_NETPBM = re.compile(rb"P[1-6]\s+(#|\d)|P7\n")
_XBM = re.compile(rb"\s*#define\s+\w+_width\s")
_MARGIN, _MARGIN_BYTES = b"\xef\xbb\xbf \t\r\n", 64  # byte order mark and white space before a text
_SVG = re.compile(rb"<(\w+:)?svg[\s>/]", re.IGNORECASE)
_AUDIO_MAGIC = ((8, b"WAVE"), (0, b"ID3"), (0, b"fLaC"), (0, b"OggS"), (8, b"AIFF"), (4, b"ftypM4A"))
_VIDEO_MAGIC = ((4, b"ftyp"), (8, b"AVI "), (0, b"\x1aE\xdf\xa3"), (0, b"FLV\1"), (0, b"\0\0\1\xba"))
_PEEKED_BYTES = 64 << 10  # an SVG may start with long comments


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
    """Return the name of a picture format that is not read, by the bytes or else by the file's name."""
    if data.startswith(b"ftypavi", 4) and not reads_avif:
        return "AVIF, which needs Pillow 11.3"
    end = name_end(name)
    if end in _RAW_ENDS:
        return end.upper()
    for offset, magic, format_name in _PICTURE_MAGIC:
        if data.startswith(magic, offset):
            return format_name or None
    by_text = _text_picture(data)
    if by_text:
        return by_text
    is_unread = _MEDIA_OF_END.get(end) == "picture" and end not in _READ_ENDS
    return end.upper() if is_unread else None


def _text_picture(data: bytes) -> str | None:
    """Return the name of a format of pictures that is written as text."""
    if _NETPBM.match(data):
        return "Netpbm"
    if data[:_MARGIN_BYTES].lstrip(_MARGIN).startswith(b"<") and _SVG.search(data[:_PEEKED_BYTES]):
        return "SVG"
    return "XBM" if _XBM.match(data) else None
