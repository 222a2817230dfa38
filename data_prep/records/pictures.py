"""Pictures that records name: read from their root and checked, never changed."""

import errno
import hashlib
import io
import os
import posixpath
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from simplejpeg import decode_jpeg

from data_prep.records.jpeg_headers import jpeg_header
from data_prep.records.rejection import Rejected
from data_prep.remote_files import Location, content, joined

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_OPENED_FORMATS = ("JPEG", "PNG", "WEBP")  # no other decoder of Pillow ever gets a record's bytes
_OTHER_FORMATS = (b"GIF8", b"BM", b"II*\0", b"MM\0*", b"<svg", b"<?xml", b"%PDF")


@dataclass(frozen=True)
class Picture:
    """The original bytes of a picture and what its header says; sizes in pixels, `sha256` of the bytes."""

    data: bytes
    extension: str
    width: int
    height: int
    sha256: bytes


def picture_in_root(root: Location, name: str) -> bytes:
    """Return the bytes of the file `root/name`.

    Raises Rejected when the file is missing, not a plain file, not readable, or outside the root; links are
    followed before that check, so neither `..` nor a link leads out. A remote root whose server fails raises
    Unreachable.
    """
    if not isinstance(root, Path):
        return _remote_picture(root, name)
    try:
        data = _plain_file(root, name)
        return _followed_file(root, name) if data is None else data
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: the name has a NUL
        raise Rejected("missing_image", f"{name} is not in its root") from error
    except PermissionError as error:
        raise Rejected("unreadable_image", f"{name} is not readable") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise Rejected("missing_image", f"{name[:80]} is not a possible file name") from error
        raise  # a failing disk or server is not the row's fault


def _plain_file(root: Path, name: str) -> bytes | None:
    """Return the bytes of a file that is not a link and whose folder is known, or None for all others.

    `_followed_file` looks at every part of the path, which takes about 20 of a sample's 250 µs.
    """
    folder, _, last = name.rpartition("/")
    real_folder = _folder_inside(root, folder)
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
def _folder_inside(root: Path, folder: str) -> str | None:
    """Return the real path of the folder `root/folder`, None when it is outside the root."""
    path, real_root = os.path.realpath(os.path.join(root, folder)), _real_path(root)
    return path if os.path.commonpath([path, real_root]) == real_root else None


def _followed_file(root: Path, name: str) -> bytes:
    real_root = _real_path(root)
    path = os.path.realpath(os.path.join(real_root, name))
    if os.path.commonpath([path, real_root]) != real_root:
        raise Rejected("path_outside_root", f"{name} leads out of its root")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Rejected("not_a_file", f"{name} is a folder or a device")
    with open(path, "rb") as file:
        return file.read()


def _remote_picture(root: str, name: str) -> bytes:
    if "://" in name or posixpath.normpath(f"./{name}").startswith("..") or name.startswith("/"):
        raise Rejected("path_outside_root", f"{name} leads out of its root")
    try:
        return content(joined(root, name))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Rejected("missing_image", f"{name} is not in its root") from error
    except IsADirectoryError as error:
        raise Rejected("not_a_file", f"{name} is a folder") from error


@lru_cache(maxsize=64)
def _real_path(root: Path) -> str:
    return os.path.realpath(root)


def checked_picture(data: bytes, name: str, *, max_pixels: int, decode: bool) -> Picture:
    """Return the picture in `data`. Raises Rejected when it is not JPEG, PNG or WebP, too large, or damaged.

    With `decode` all of its coded data is decoded, without it only the header is read.
    """
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
        with Image.open(io.BytesIO(data), formats=_OPENED_FORMATS) as image:
            width, height = image.size
            extension = _EXTENSIONS[str(image.format)]
            if width * height > max_pixels:
                raise Rejected("too_many_pixels", f"{name} has {width} x {height} pixels, over {max_pixels}")
            if decode:
                image.load()
                if image.mode != "RGB":
                    image.convert("RGB")
    except (Rejected, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Rejected("too_many_pixels", f"{name} has over {max_pixels} pixels") from error
    except Exception as error:  # decoders raise anything on damaged bytes, even SyntaxError and struct.error
        if data.startswith(_OTHER_FORMATS) or data[4:8] == b"ftyp":
            raise Rejected("picture_format", f"{name} is not JPEG, PNG or WebP") from error
        # Pillow's text about unknown bytes contains a memory address, which must not get into the ledger
        problem = "not a picture" if isinstance(error, UnidentifiedImageError) else error
        raise Rejected("undecodable_image", f"{name}: {problem}") from error
    return Picture(data, extension, width, height, hashlib.sha256(data).digest())
