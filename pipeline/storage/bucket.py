"""Objects of an S3 bucket below a prefix: listed, read in full or in ranges, written under a condition.

Used by pipeline/storage/object_store.py alone. Every request is tried again while the server fails or a body stops
early, as long as VICO_REMOTE_PATIENCE_S says. botocore is imported when the first object is asked for.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from data_prep.remote_files import patiently
from vico.errors import UserError

Found = TypeVar("Found")
WINDOW_BYTES = 16 << 20
PART_BYTES = 64 << 20
"""Larger files are uploaded in parts of this size, or more of them than S3 takes would be needed."""
_MOST_PARTS = 10_000
_GONE = ("404", "NoSuchKey", "NotFound")
_FAILED_CONDITION = ("412", "PreconditionFailed")
_NOT_UNDERSTOOD = ("400", "501", "NotImplemented", "InvalidArgument", "InvalidRequest", "NoSuchBucket")


class ConditionFailed(Exception):
    """The object is not, or no longer, what the condition of a write says."""


@dataclass(frozen=True)
class Listed:
    key: str
    bytes: int
    etag: str


class Bucket:
    """The objects below `s3://bucket/prefix`; keys are relative to the prefix."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self.name, _, self._prefix = self.address.removeprefix("s3://").partition("/")

    @cached_property
    def client(self) -> Any:
        """A client of botocore, which threads share; it reads addresses and secrets as all AWS tools do."""
        try:
            from botocore.config import Config
            from botocore.session import Session
        except ImportError as error:
            raise UserError(
                f"storage={self.address} needs the package botocore; install it: pip install s3fs"
            ) from error
        config = Config(
            retries={"total_max_attempts": 1},  # ours are counted
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=32,
            request_checksum_calculation="when_required",  # other stores than AWS do not know the newer sums
            response_checksum_validation="when_required",
        )
        session = Session()
        region = session.get_config_variable("region") or "us-east-1"
        return session.create_client("s3", region_name=region, config=config)

    def place(self, key: str) -> str:
        return f"{self.address}/{key}"

    def listed(self, prefix: str) -> list[Listed]:
        """All objects whose key begins with `prefix`."""
        pages = self._pages(prefix, "")
        own = len(self._key(""))
        return [
            Listed(one["Key"][own:], one["Size"], one["ETag"])
            for page in pages
            for one in page.get("Contents", [])
        ]

    def folders(self, prefix: str = "") -> list[str]:
        """The first parts of the keys below `prefix`, each with its slash."""
        own = len(self._key(""))
        return [
            one["Prefix"][own:] for page in self._pages(prefix, "/") for one in page.get("CommonPrefixes", [])
        ]

    def get(self, key: str) -> tuple[bytes, str] | None:
        """(content, ETag); None where there is none."""

        def once() -> tuple[bytes, str]:
            found = self.client.get_object(Bucket=self.name, Key=self._key(key))
            return found["Body"].read(), found["ETag"]

        return self._asked(once, key)

    def put(self, key: str, data: bytes, *, etag: str | None) -> str:
        """Write an object that has this ETag now, None: that is not there; its new ETag.

        Raises ConditionFailed where that does not hold.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}

        def once() -> str:
            asked = {"Bucket": self.name, "Key": self._key(key), "Body": data, **condition}
            return self.client.put_object(**asked)["ETag"]

        try:
            new = self._asked(once, key, "written")
        except ConditionFailed:
            new = None
        if new is None:
            there = self.get(key)
            if there is None or there[0] != data:
                raise ConditionFailed(self.place(key))
            new = there[1]  # an earlier try arrived, its answer did not
        return new

    def put_anyway(self, key: str, data: bytes) -> str:
        """Write an object whatever is there; its ETag."""
        asked = {"Bucket": self.name, "Key": self._key(key), "Body": data}
        return self._asked(lambda: self.client.put_object(**asked)["ETag"], key, "written")

    def upload(self, key: str, path: Path) -> None:
        """Write an object from a file, in parts where it is large. Of one that grows, as a log does, what it
        holds now: the client takes digest and length of an open file one after the other.
        """
        size = path.stat().st_size
        where = {"Bucket": self.name, "Key": self._key(key)}
        if size <= PART_BYTES:
            with path.open("rb") as file:
                self.put_anyway(key, file.read(size))
            return
        begun = self._asked(lambda: self.client.create_multipart_upload(**where), key, "written")
        where["UploadId"] = begun["UploadId"]
        try:
            made = [
                {"PartNumber": number, "ETag": self._upload_part(where, number, data, key)}
                for number, data in enumerate(_pieces(path, size), start=1)
            ]
            asked = {**where, "MultipartUpload": {"Parts": made}}
            self._asked(lambda: self.client.complete_multipart_upload(**asked), key, "written")
        except BaseException:
            self._asked(lambda: self.client.abort_multipart_upload(**where), key, "written")
            raise

    def _upload_part(self, where: dict[str, Any], number: int, data: bytes, key: str) -> str:
        asked = {**where, "PartNumber": number, "Body": data}
        return self._asked(lambda: self.client.upload_part(**asked)["ETag"], key, "written")

    def windows(self, key: str, num_bytes: int) -> Iterator[bytes]:
        """The content, window by window; FileNotFoundError where there is none."""
        for start in range(0, num_bytes, WINDOW_BYTES):
            end = min(start + WINDOW_BYTES, num_bytes)

            def once(start: int = start, end: int = end) -> bytes:
                asked = {"Bucket": self.name, "Key": self._key(key), "Range": f"bytes={start}-{end - 1}"}
                data = self.client.get_object(**asked)["Body"].read()
                if len(data) != end - start:
                    raise OSError(f"the body has {len(data)} of {end - start} bytes")
                return data

            data = self._asked(once, key)
            if data is None:
                raise FileNotFoundError(self.place(key))
            yield data

    def sha256(self, key: str, num_bytes: int) -> str:
        found = hashlib.sha256()
        for window in self.windows(key, num_bytes):
            found.update(window)
        return found.hexdigest()

    def copy(self, key: str, to: str) -> None:
        """Copy a small object within the bucket."""
        source = {"Bucket": self.name, "Key": self._key(key)}
        asked = {"Bucket": self.name, "Key": self._key(to), "CopySource": source}
        self._asked(lambda: self.client.copy_object(**asked), to, "written")

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, in this order; quietly those that are not there."""
        for key in keys:
            asked = {"Bucket": self.name, "Key": self._key(key)}
            self._asked(lambda asked=asked: self.client.delete_object(**asked), key, "written")

    def _pages(self, prefix: str, delimiter: str) -> Iterator[dict[str, Any]]:
        asked = {"Bucket": self.name, "Prefix": self._key(prefix), "Delimiter": delimiter}
        while True:
            page = self._asked(lambda: self.client.list_objects_v2(**asked), prefix) or {}
            yield page
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _asked(self, action: Callable[[], Found], key: str, verb: str = "read") -> Found | None:
        """What the action gives; None for an object that is not there."""
        _ = self.client  # says what to install where botocore is missing
        from botocore.exceptions import ClientError

        def once() -> Found | None:
            try:
                return action()
            except ClientError as error:
                code = str(error.response.get("Error", {}).get("Code"))
                status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
                if code in _GONE or (status == "404" and code != "NoSuchBucket"):
                    return None
                if {code, status} & set(_FAILED_CONDITION):
                    return _FAILED
                if status == "403":
                    raise PermissionError(code) from error
                if {code, status} & set(_NOT_UNDERSTOOD):
                    raise UserError(
                        f"storage={self.address}: the store refuses a request ({code}: {error}); name a "
                        "bucket that is there, in a store that knows conditional writes"
                    ) from error
                raise

        found = patiently(once, self.place(key), verb)
        if found is _FAILED:
            raise ConditionFailed(self.place(key))
        return found


_FAILED: Any = object()


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    piece_bytes = max(PART_BYTES, -(-size // _MOST_PARTS))
    with path.open("rb") as file:
        while piece := file.read(piece_bytes):
            yield piece
