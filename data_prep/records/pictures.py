"""Pictures as records name them: found under their root, looked into, never changed."""

import errno
import hashlib
import io
import os
import posixpath
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image
from simplejpeg import decode_jpeg

from data_prep.records.jpeg_headers import jpeg_header
from data_prep.records.rejection import Rejected
from data_prep.remote_files import Place, content, joined

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_OPENED_FORMATS = ("JPEG", "PNG", "WEBP")  # no other decoder of Pillow ever sees a record's bytes
_OTHER_FORMATS = (b"GIF8", b"BM", b"II*\0", b"MM\0*", b"<svg", b"<?xml", b"%PDF")


@dataclass(frozen=True)
class Picture:
    """A picture's original bytes and what was read from them; sizes in pixels, `sha256` of the bytes."""

    data: bytes
    extension: str
    width: int
    height: int
    sha256: bytes


def picture_in_root(root: Place, name: str) -> bytes:
    """The bytes of the file `root/name`; Rejected when it is missing, not a file, or lies outside the root.

    Links are followed before the check, so that neither `..` nor a link leads out. A remote root whose server
    fails raises Unreachable.
    """
    if not isinstance(root, Path):
        return _remote_picture(root, name)
    try:
        found = _plain_file(root, name)
        return _followed_file(root, name) if found is None else found
    except (
        FileNotFoundError,
        NotADirectoryError,
        ValueError,
    ) as error:  # ValueError: a name with a NUL in it
        raise Rejected("missing_image", f"{name} is not under its root") from error
    except PermissionError as error:
        raise Rejected("unreadable_image", f"{name} may not be read") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise Rejected("missing_image", f"{name[:80]} is no possible file name") from error
        raise  # a failing disk or server is not the row's fault


def _plain_file(root: Path, name: str) -> bytes | None:
    """The bytes of a file that is no link, in a folder that was looked into before; None: look closer.

    A full look asks for every part of the path, some 20 µs of a sample's 250.
    """
    folder, _, last = name.rpartition("/")
    inside = _folder_inside(root, folder)
    if inside is None or name.startswith("/") or last in ("", ".", ".."):
        return None
    path = f"{inside}/{last}"
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        return None
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        data = os.read(file, found.st_size + 1)
    finally:
        os.close(file)
    return data if len(data) == found.st_size else None  # else it is over 2 GiB, or changed just now


@lru_cache(maxsize=4096)
def _folder_inside(root: Path, folder: str) -> str | None:
    """The real path of the folder `root/folder`; None when it lies outside the root."""
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
        raise Rejected("missing_image", f"{name} is not under its root") from error
    except IsADirectoryError as error:
        raise Rejected("not_a_file", f"{name} is a folder") from error


@lru_cache(maxsize=64)
def _real_path(root: Path) -> str:
    return os.path.realpath(root)


def checked_picture(data: bytes, name: str, *, max_pixels: int, decode: bool) -> Picture:
    """The picture in `data`; Rejected when it is no JPEG, PNG or WebP, too large, or broken.

    With `decode` all that is coded in it is decoded, else only its header is read.
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
    """Whether a JPEG decodes without a warning at an eighth of its size, as gray: all of its entropy-coded
    bytes are decoded for that, in half of the time. What fails is decoded whole by Pillow, and that decides.
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
            extension = _EXTENSIONS[image.format]
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
    except (
        Exception
    ) as error:  # decoders raise what they like on broken bytes, SyntaxError and struct.error included
        if data.startswith(_OTHER_FORMATS) or data[4:8] == b"ftyp":
            raise Rejected("picture_format", f"{name} is not JPEG, PNG or WebP") from error
        # Pillow's own text for bytes it does not know holds a memory address; the ledger must not
        what = "not a picture" if isinstance(error, Image.UnidentifiedImageError) else error
        raise Rejected("undecodable_image", f"{name}: {what}") from error
    return Picture(data, extension, width, height, hashlib.sha256(data).digest())
