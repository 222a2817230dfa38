"""Pictures that records name: read from their root and checked, never changed."""

import errno
import hashlib
import os
import posixpath
import stat
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from PIL import Image, UnidentifiedImageError
from simplejpeg import decode_jpeg

from data_prep.records.file_kinds import foreign_kind
from data_prep.records.media.jpeg_headers import jpeg_header
from data_prep.records.media.kinds import media_of_bytes, name_end, unread_format
from data_prep.records.rejection import Rejected, shown
from data_prep.remote_files import Location, content, joined
from vico.picture_files import PICTURE_FORMATS, check_structure, open_picture

_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "DIB": "bmp",
    "TIFF": "tif",
    "AVIF": "avif",
}
_WIDE_MODES = ("F", "I")
"""Pillow would cut their values off at 255: a picture of floats from 0 to 1 would be black."""
_FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"


class Picture(NamedTuple):
    """The original bytes of a picture and what its header says; sizes in pixels, `sha256` of the bytes."""

    data: bytes
    extension: str
    width: int
    height: int
    sha256: bytes


def picture_in_root(root: Location, name: str, *, follow_links: bool = False) -> bytes:
    """Return the bytes of the file `root/name`; `name` may be absolute, or a file:// address.

    Raises Rejected when the file is missing, not a plain file, not readable, or outside the root; links are
    followed before that check, so neither `..` nor a link leads out. With `follow_links` a link may, and the
    name alone must be inside. A remote root whose server fails raises Unreachable.
    """
    if name.startswith("file://"):
        name = unquote(name.removeprefix("file://").removeprefix("localhost"))
    if name.startswith(("http://", "https://")):
        raise Rejected("missing_image", f"{shown(name)} is not downloaded; download it, and name the file")
    if not isinstance(root, Path):
        return _remote_picture(root, name)
    try:
        data = _plain_file(root, name, follow_links)
        return _followed_file(root, name, follow_links) if data is None else data
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: the name has a NUL
        raise Rejected("missing_image", f"{shown(name)} is not in its root {root}") from error
    except PermissionError as error:
        raise Rejected("unreadable_image", f"{shown(name)} is not readable") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise Rejected("missing_image", f"{shown(name)} is not a possible file name") from error
        raise  # a failing disk or server is not the row's fault


def _plain_file(root: Path, name: str, follow_links: bool) -> bytes | None:
    """Return the bytes of a file that is not a link and whose folder is known, or None for all others.

    `_followed_file` looks at every part of the path, which takes about 20 of a sample's 250 µs.
    """
    folder, _, last = name.rpartition("/")
    real_folder = _folder_inside(root, folder, follow_links)
    if real_folder is None or name.startswith("/") or last in ("", ".", ".."):
        return None
    path = f"{real_folder}/{last}"
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        return None
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        data = os.read(file, status.st_size + 1)
    finally:
        os.close(file)
    return data if len(data) == status.st_size else None  # else it has over 2 GiB, or is being changed


@lru_cache(maxsize=4096)
def _folder_inside(root: Path, folder: str, follow_links: bool) -> str | None:
    """Return the real path of the folder `root/folder`, None when it is outside the root."""
    path = os.path.join(os.path.abspath(root), folder)
    if not _is_inside(path, root, follow_links):
        return None
    return os.path.realpath(os.path.normpath(path) if follow_links else path)


def _is_inside(path: str, root: Path, follow_links: bool) -> bool:
    """Return whether a path is in the root: with `follow_links` by its name, else by where its links lead."""
    if follow_links:
        # the root may be given by its own name or by the one its links lead to
        path = os.path.normpath(path)
        return any(
            os.path.commonpath([path, base]) == base for base in (os.path.abspath(root), _real_path(root))
        )
    return os.path.commonpath([os.path.realpath(path), _real_path(root)]) == _real_path(root)


def _followed_file(root: Path, name: str, follow_links: bool) -> bytes:
    path = os.path.join(os.path.abspath(root), name)
    if not _is_inside(path, root, follow_links):
        raise Rejected("path_outside_root", _outside(root, name, _is_inside(path, root, True)))
    path = os.path.normpath(path) if follow_links else os.path.realpath(path)
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Rejected("not_a_file", f"{shown(name)} is a folder or a device")
    with open(path, "rb") as file:
        return file.read()


def _outside(root: Location, name: str, by_link: bool = False) -> str:
    where = f"{shown(name)} leads out of its root {root}"
    if by_link:
        return (
            f"{where} by a link; set inputs.records.follow_links: true, or a root that holds what it links to"
        )
    return f"{where}; set root to a folder that holds the picture (/ holds all)"


def _remote_picture(root: str, name: str) -> bytes:
    inside = name.removeprefix(f"{root.rstrip('/')}/")  # an address below the root
    if "://" in inside or posixpath.normpath(f"./{inside}").startswith("..") or inside.startswith("/"):
        raise Rejected("path_outside_root", _outside(root, name))
    try:
        return content(joined(root, inside))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Rejected("missing_image", f"{shown(name)} is not in its root {root}") from error
    except IsADirectoryError as error:
        raise Rejected("not_a_file", f"{shown(name)} is a folder") from error


@lru_cache(maxsize=64)
def _real_path(root: Path) -> str:
    return os.path.realpath(root)


def checked_picture(data: bytes, name: str, *, max_pixels: int, decode: bool) -> Picture:
    """Return the picture in `data`. Raises Rejected when its format is not read, it is too large, or damaged.

    With `decode` all of its coded data is decoded, without it only the header is read.
    """
    try:
        check_structure(data)
    except ValueError as error:
        raise Rejected("undecodable_image", f"{shown(name)} is {error}") from None
    header = jpeg_header(data)
    if (
        header is None
        or header.width * header.height > max_pixels
        or (decode and not (header.even and _decodes_small(data)))
    ):
        return _opened_picture(data, name, max_pixels, decode)
    return Picture(data, "jpg", header.width, header.height, hashlib.sha256(data).digest())


def _decodes_small(data: bytes) -> bool:
    """Return whether a JPEG decodes without a warning at an eighth of its size, in gray.

    That decodes all of its entropy-coded bytes in half the time. Pillow decodes the pictures that fail here
    at full size, and its verdict counts.
    """
    try:
        decode_jpeg(data, colorspace="GRAY", fastdct=True, min_height=1, min_width=1, min_factor=8)
    except ValueError:
        return False
    return True


def _opened_picture(data: bytes, name: str, max_pixels: int, decode: bool) -> Picture:
    try:
        with open_picture(data) as image:
            width, height = image.size
            extension = _EXTENSIONS[str(image.format)]
            if width * height > max_pixels:
                message = f"{shown(name)} has {width} x {height} pixels, over {max_pixels}"
                raise Rejected("too_many_pixels", message)
            if image.mode in _WIDE_MODES:
                message = f"{shown(name)} has pixels of 32 bits, whose range is unknown; scale them to 8 bits"
                raise Rejected("picture_format", message)
            if decode:
                image.load()
                if image.mode != "RGB":
                    image.convert("RGB")
    except (Rejected, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Rejected("too_many_pixels", f"{shown(name)} has over {max_pixels} pixels") from error
    except Exception as error:  # decoders raise anything on damaged bytes, even SyntaxError and struct.error
        raise _unopened(data, name, error) from error
    return Picture(data, extension, width, height, hashlib.sha256(data).digest())


def _unopened(data: bytes, name: str, error: Exception) -> Rejected:
    """Return the reason why a picture did not open: another format, another kind of file, or damage."""
    foreign = foreign_kind(data[:4096])
    if foreign is not None and name_end(name) not in ("svg", "svgz"):
        return Rejected("undecodable_image", f"{shown(name)} is {foreign}")
    media = media_of_bytes(data)
    if media in ("audio", "video"):
        what = "audio" if media == "audio" else "a video"
        return Rejected(media, f"{shown(name)} is {what}, not a picture")
    format_name = unread_format(data, name, "AVIF" in PICTURE_FORMATS)
    if format_name is not None:
        return Rejected("picture_format", f"{shown(name)} is {format_name}, and not {_FORMAT_NAMES}")
    # Pillow's text about unknown bytes contains a memory address, which must not get into the ledger
    problem: object = error
    if isinstance(error, UnidentifiedImageError):
        problem = "its header is damaged" if media == "picture" else "not a picture" if data else "empty"
    return Rejected("undecodable_image", f"{shown(name)}: {problem}")
