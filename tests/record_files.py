"""InternVL record files for tests: small pictures, rows, meta files, and a set with every kind of bad row."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (60, 40), format: str = "PNG") -> bytes:
    """Return an encoded picture of smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(data, format)
    return data.getvalue()


def row(image: str | list[str] | None = None, answer: str = "an answer", **fields: object) -> dict[str, Any]:
    """Return a row with one question about its pictures and one answer."""
    names = [image] if isinstance(image, str) else image or []
    question = "<image>\n" * len(names) + "what is written here?"
    conversations = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    shown = {} if image is None else {"image": image}
    return {**shown, "conversations": conversations, **fields}


def write_lines(path: Path, lines: Sequence[dict[str, Any] | bytes]) -> Path:
    """Write a JSONL file of rows; bytes are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


def write_meta(folder: Path, **sets: dict[str, Any]) -> Path:
    """Write a meta file; sets have root `images` and annotation `NAME.jsonl` unless they say otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    meta = {
        name: {"root": "images", "annotation": f"{name}.jsonl", **fields} for name, fields in sets.items()
    }
    path = folder / "meta.json"
    path.write_text(json.dumps(meta))
    return path


def write_good_records(folder: Path, num_rows: int = 24) -> Path:
    """Write a set `good` (0 to 2 pictures in three formats, one or two questions); return its meta file."""
    meta = write_meta(folder, good={})
    rows = []
    for n in range(num_rows):
        format, extension = (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"))[n % 3]
        names = [f"{n}-{k}.{extension}" for k in range(n % 4 if n % 4 < 3 else 1)]
        for k, name in enumerate(names):
            (folder / "images" / name).write_bytes(
                picture(10 * n + k, (50 + 7 * (n % 30), 120 - 3 * (n % 30)), format)
            )
        image = names[0] if len(names) == 1 else names or None
        good_row = row(image, f"answer {n}", id=n, group=f"group {n // 2}")
        if n % 5 == 0:
            good_row["conversations"] += [
                {"from": "human", "value": "and?"},
                {"from": "gpt", "value": "no more"},
            ]
        rows.append(good_row)
    write_lines(folder / "good.jsonl", rows)
    return meta


def write_sharing_records(folder: Path, num_rows: int) -> tuple[Path, int]:
    """Write a set `pairs` of rows without groups: of two pictures, three rows each with one in common, and of
    one picture. Return its meta file and the number of rows.
    """
    meta = write_meta(folder, pairs={})
    for n in range(2 * num_rows):
        (folder / "images" / f"{n}.png").write_bytes(picture(n, (20, 20)))
    rows = [row([f"{2 * n}.png", f"{2 * (n - n % 3) + 1}.png"], answer=str(n)) for n in range(num_rows)]
    rows += [row(f"{n}.png", answer=f"alone {n}") for n in range(0, num_rows, 5)]
    write_lines(folder / "pairs.jsonl", rows)
    return meta, len(rows)


def write_hostile_records(folder: Path) -> tuple[Path, dict[int, str]]:
    """Write a set `bad` with every kind of bad row between good ones; return (meta file, line -> reason).

    The reasons hold for `max_pixels=200_000`, `max_tokens=400` and the tiny model of these tests.
    """
    meta = write_meta(folder, bad={})
    write_hostile_pictures(folder)
    cases = hostile_rows()
    write_lines(folder / "bad.jsonl", [line for line, _ in cases])
    return meta, {n: reason for n, (_, reason) in enumerate(cases) if reason}


def write_hostile_pictures(folder: Path) -> None:
    """Write the pictures that `hostile_rows` names: good, damaged, too large, of other kinds, outside."""
    images = folder / "images"
    good, good_jpeg = picture(1), picture(2, format="JPEG")
    (images / "good.png").write_bytes(good)
    (images / "other.jpg").write_bytes(good_jpeg)
    (images / "cut.jpg").write_bytes(picture(3, (300, 300), "JPEG")[:-400])
    (images / "cut.png").write_bytes(picture(4, (300, 300))[:300])
    (images / "text.png").write_bytes(b"this is not a picture")
    (images / "empty.png").write_bytes(b"")
    (images / "drawn.svg").write_bytes(b'<svg xmlns="http://www.w3.org/2000/svg"/>')
    (images / "large.png").write_bytes(picture(6, (500, 500)))
    (images / "folder.png").mkdir()
    (folder / "secret.png").write_bytes(good)
    os.symlink(folder / "secret.png", images / "link.png")
    os.mkfifo(images / "pipe.png")


def hostile_rows() -> list[tuple[dict[str, Any] | bytes, str | None]]:
    """Return (line, reason) of rows with every kind of fault; the reason is None for good rows."""
    turn = {"from": "human", "value": "hello"}
    return [
        (row("good.png"), None),
        (b"", "not_json"),
        (b'{"conversations": [', "not_json"),
        (b'{"conversations": NaN}', "broken_row"),
        (b"[" * 100_000, "not_json"),
        (b'{"id": "\xff\xfe"}', "not_utf8"),
        (json.dumps(row(answer="half \ud800")).encode(), "not_utf8"),
        (b"[1, 2]", "not_an_object"),
        (b'"text"', "not_an_object"),
        ({"id": 5}, "broken_row"),
        ({"conversations": "hello"}, "broken_row"),
        ({"conversations": [turn, {"from": "gpt", "value": 7}]}, "broken_row"),
        ({"conversations": [turn, turn, {"from": "gpt", "value": "x"}]}, "broken_row"),
        ({"conversations": [{"from": "robot", "value": "x"}, {"from": "gpt", "value": "x"}]}, "broken_row"),
        ({**row(), "image": 3}, "broken_row"),
        (row("good.png", image_2="other.jpg"), "unread_field"),
        (row(answer="<IMG_CONTEXT>"), "control_token"),
        ({**row(), "video": "v.mp4"}, "video"),
        ({**row(), "audios": ["a.wav"]}, "audio"),
        ({"conversations": [turn]}, "no_answer"),
        ({"conversations": [turn, {"from": "gpt", "value": "x"}, turn]}, "no_answer"),
        (row("good.png", answer=" \n"), "empty_answer"),
        (row("absent.png"), "missing_image"),
        (row("good.png/inside.png"), "missing_image"),
        (row("nul\0.png"), "missing_image"),
        (row("x" * 5000 + ".png"), "missing_image"),  # without a dot it would be base64
        (row("../secret.png"), "path_outside_root"),
        (row("/etc/passwd"), "path_outside_root"),
        (row("link.png"), "path_outside_root"),
        (row("folder.png"), "not_a_file"),
        (row("pipe.png"), "not_a_file"),
        (row("cut.jpg"), "undecodable_image"),
        (row("cut.png"), "undecodable_image"),
        (row("text.png"), "undecodable_image"),
        (row("empty.png"), "undecodable_image"),
        (row("drawn.svg"), "picture_format"),
        (row("large.png"), "too_many_pixels"),
        ({**row("other.jpg"), "conversations": row(["a", "b"])["conversations"]}, "image_count"),
        ({**row(), "conversations": row("good.png")["conversations"]}, "image_count"),
        ({**row("good.png"), "conversations": row(["a", "b"])["conversations"]}, "image_count"),
        (row(answer="word " * 2000), "over_budget"),
        (row("good.png"), "duplicate"),
        (row(answer="last and good"), None),
    ]
