"""Hostile files from good ones: bytes and JSON values changed in the ways that break readers.

All of them are hypothesis strategies, so a failing file is made smaller before it is reported.
"""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

MAX_BYTES = 1 << 20
_MAX_PLACE_DEPTH = 20
_WORDS = (
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b"\xff\xff\xff\x7f",
    b"\n",
    b"\r\n",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b"\\ud800",
    b"../",
    b"/",
    b"PAR1",
    b"ustar\x00",
    b"\x1f\x8b",
    b"\xff\xd8",
    b"IHDR",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!python/object:os.system ",
    b"1e999",
    b"NaN",
    b"<image>",
    b"\xef\xbb\xbf",
    b"\x1b]0;x\x07",
    b"0" * 50,
)
_TEXTS = (
    "",
    " ",
    "\0",
    "\ud800",
    "..",
    "../outside/secret.png",
    "/etc/passwd",
    "/proc/self/environ",
    "/dev/zero",
    "images",
    "good.png",
    "file://../outside/secret.png",
    "data:image/png;base64,AAAA",
    "<image>",
    "<|im_end|>",
    "<IMG_CONTEXT>",
    "human",
    "gpt",
    "system",
    "\x1b[2J",
    "a" * 5000,
    "%s%n",
    "http://127.0.0.1:9/x",
    "gopher://x",
    "\u202e",
    "1e5",
    "nan",
    "{{",
    "${HOME}",
    "-1",
    "~",
    "~root",
    "é\u0301",
)
_NUMBERS = (
    0,
    -1,
    1,
    2**31 - 1,
    2**31,
    -(2**31) - 1,
    2**63,
    2**64,
    -(2**63) - 1,
    10**30,
    10**60,
    0.5,
    -0.0,
    1e308,
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(_NUMBERS),
    st.sampled_from(_TEXTS),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)


def _nested(depth: int, kind: str) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


values = st.one_of(
    scalars,
    st.lists(scalars, max_size=4),
    st.dictionaries(st.sampled_from(_TEXTS) | st.text(max_size=8), scalars, max_size=3),
    st.builds(_nested, st.sampled_from([2, 63, 64, 65, 900, 3000]), st.sampled_from(["list", "dict"])),
)


@st.composite
def bytes_of(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """Draw one of the good files with up to eight changes: bytes, words, cuts, copies, parts of another."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, len(data)))
        kind = draw(
            st.sampled_from(["set", "flip", "word", "over", "cut", "double", "splice", "number", "drop"])
        )
        length = draw(st.integers(1, 64) | st.integers(1, max(1, len(data))))
        if kind == "set" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "word":
            data[at:at] = draw(st.sampled_from(_WORDS))
        elif kind == "over":
            word = draw(st.sampled_from(_WORDS))
            data[at : at + len(word)] = word
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "splice":
            other = draw(st.sampled_from(seeds))
            begin = draw(st.integers(0, len(other)))
            data[at : at + length] = other[begin : begin + length]
        elif kind == "number":
            size = draw(st.sampled_from([2, 4, 8]))
            number = draw(
                st.sampled_from([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1])
            )
            order = draw(st.sampled_from(["little", "big"]))
            data[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, order)  # type: ignore[arg-type]
    return bytes(data[:MAX_BYTES])


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of a value and all that it holds, down to a depth of 20."""
    if len(path) > _MAX_PLACE_DEPTH:
        return [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in inner for place in _places(child, (*path, key)))]


@st.composite
def changed_value(draw: st.DrawFn, seeds: Sequence[Any]) -> Any:
    """Draw one of the good JSON values with up to four places changed, removed, renamed or added."""
    value = json.loads(json.dumps(draw(st.sampled_from(seeds))))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(_places(value)))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                value = draw(values)
            elif isinstance(value, dict):
                value[draw(st.sampled_from(_TEXTS))] = draw(values)
            continue
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["set", "remove", "rename", "double"]))
        if kind == "remove":
            del parent[place[-1]]
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(_TEXTS))] = parent.pop(place[-1])
        elif kind == "double" and isinstance(parent, list):
            parent.extend(list(parent) * draw(st.sampled_from([1, 1, 40])))
        else:
            parent[place[-1]] = draw(values)
        if len(_places(value)) > 2000:
            break
    return value


def encoded(value: Any) -> bytes:
    """Return JSON as hostile writers make it: NaN, infinities and halves of surrogate pairs stay."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 3000 + b"]" * 3000


def json_of(seeds: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """Draw JSON: a good value changed in its structure, or in its bytes."""
    texts = [encoded(seed) for seed in seeds]
    return st.one_of(changed_value(seeds).map(encoded), bytes_of(texts))
