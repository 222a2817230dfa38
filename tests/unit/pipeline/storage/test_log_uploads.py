"""Logs on their way to an object store."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.storage.log_uploads import LogUploads


class RacyBucket:
    """A bucket in whose uploads a file is removed between its size and its content; it cannot be timed."""

    def __init__(self):
        self.keys: list[str] = []

    def upload(self, key: str, path: Path) -> None:
        if path.name.startswith("stop-notice"):
            path.unlink()
        if path.name.startswith(("stop-notice", "refused")):
            raise FileNotFoundError(path)
        self.keys.append(key)


def test_a_file_that_is_removed_meanwhile_ends_no_upload(tmp_path):
    bucket = RacyBucket()
    uploads = LogUploads(SimpleNamespace(bucket=bucket, key=lambda path: path.name))
    for name in ("rank-0.log", "stop-notice-0.txt", "z.jsonl", ".phase.json"):
        (tmp_path / name).write_text("text")
    uploads.upload_changed(tmp_path)
    assert bucket.keys == ["rank-0.log", "z.jsonl"]
    (tmp_path / "refused").write_text("the store has no such bucket")
    with pytest.raises(FileNotFoundError, match="refused"):
        uploads.upload_changed(tmp_path)
