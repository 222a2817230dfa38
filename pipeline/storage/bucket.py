"""Objects of an S3 bucket below a prefix: listing, reading, writing under a condition.

Used by `object_store.py` and its neighbours. Every request is retried while the server fails or a body ends
early, for at most VICO_REMOTE_PATIENCE_S seconds. botocore is imported at the first request.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from data_prep.remote_files import with_retries
from vico.errors import UserError, missing_package

Result = TypeVar("Result")
WINDOW_BYTES = 16 << 20
PART_BYTES = 64 << 20
"""Larger files are uploaded in parts of this size, or of a larger one if S3's limit of parts needs that."""
_MAX_PARTS = 10_000
_GONE = ("404", "NoSuchKey", "NotFound")
_FAILED_CONDITION = ("412", "PreconditionFailed")
_NOT_UNDERSTOOD = (
    "501",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "InvalidArgument",
    "InvalidBucketName",
    "InvalidRequest",
    "MethodNotAllowed",
    "NoSuchBucket",
    "NotImplemented",
)
"""Refusals that stay. Others with the status 400 (RequestTimeout, IncompleteBody, BadDigest) may not."""
_BAD_CREDENTIALS = ("403", "ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId")


class ConditionFailed(Exception):
    """The object does not, or no longer, fulfil the condition of a write."""


@dataclass(frozen=True)
class ListedObject:
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
        """A botocore client, shared by threads; addresses and secrets come from where all AWS tools read
        them."""
        try:
            from botocore.config import Config
            from botocore.session import Session
        except ImportError as error:
            raise missing_package(f"storage={self.address}", "botocore") from error
        config = Config(
            retries={"total_max_attempts": 1},  # retries are made and counted here
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=32,
            request_checksum_calculation="when_required",  # stores other than AWS lack the newer checksums
            response_checksum_validation="when_required",
        )
        session = Session()
        region = session.get_config_variable("region") or "us-east-1"
        return session.create_client("s3", region_name=region, config=config)

    def address_of(self, key: str) -> str:
        return f"{self.address}/{key}"

    def listed(self, prefix: str) -> list[ListedObject]:
        """Return all objects whose key begins with `prefix`."""
        start = len(self._full_key(""))
        return [
            ListedObject(entry["Key"][start:], entry["Size"], entry["ETag"])
            for page in self._pages(prefix, "")
            for entry in page.get("Contents", [])
        ]

    def folders(self, prefix: str = "") -> list[str]:
        """Return the first parts of the keys below `prefix`, each with its slash."""
        start = len(self._full_key(""))
        return [
            entry["Prefix"][start:]
            for page in self._pages(prefix, "/")
            for entry in page.get("CommonPrefixes", [])
        ]

    def get(self, key: str) -> tuple[bytes, str] | None:
        """Return (content, ETag), or None if there is no such object."""

        def once() -> tuple[bytes, str]:
            response = self.client.get_object(Bucket=self.name, Key=self._full_key(key))
            return response["Body"].read(), response["ETag"]

        return self._request(once, key)

    def put(self, key: str, data: bytes, *, etag: str | None) -> str:
        """Write an object that has this ETag now (None: that does not exist) and return its new ETag.

        Raises ConditionFailed if the object has another ETag.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        target = self._target(key)

        def once() -> str:
            return self.client.put_object(**target, Body=data, **condition)["ETag"]

        try:
            new_etag = self._request(once, key, "written")
        except ConditionFailed:
            new_etag = None
        if new_etag is None:
            current = self.get(key)
            if current is None or current[0] != data:
                raise ConditionFailed(self.address_of(key))
            new_etag = current[1]  # an earlier try arrived, but its answer did not
        return new_etag

    def overwrite(self, key: str, data: bytes) -> str:
        """Write an object without a condition and return its ETag."""
        target = self._target(key)
        return self._write(lambda: self.client.put_object(**target, Body=data)["ETag"], key)

    def upload(self, key: str, path: Path) -> None:
        """Write an object from a file, in parts if it is large.

        Of a file that grows, such as a log, this uploads what it contains now: the client would take digest
        and length of an open file one after the other.
        """
        num_bytes = path.stat().st_size
        if num_bytes <= PART_BYTES:
            with path.open("rb") as file:
                self.overwrite(key, file.read(num_bytes))
            return
        target = self._target(key)
        created = self._write(lambda: self.client.create_multipart_upload(**target), key)
        target["UploadId"] = created["UploadId"]
        try:
            uploaded = [
                {"PartNumber": number, "ETag": self._upload_part(target, number, data, key)}
                for number, data in enumerate(_pieces(path, num_bytes), start=1)
            ]
            parts = {"Parts": uploaded}
            # None if the upload is unknown by now: an earlier try completed it, but its answer did not arrive
            self._request(
                lambda: self.client.complete_multipart_upload(**target, MultipartUpload=parts), key, "written"
            )
        except BaseException:
            self._request(lambda: self.client.abort_multipart_upload(**target), key, "written")
            raise

    def unfinished_uploads(self, prefix: str, older_than: timedelta) -> dict[str, str]:
        """Return the uploads in parts that a kill left, as id -> key; they are in no list of objects."""
        arguments, found = {"Bucket": self.name, "Prefix": self._full_key(prefix)}, {}
        start, before = len(self._full_key("")), datetime.now(UTC) - older_than
        while True:
            page = self._request(lambda: self.client.list_multipart_uploads(**arguments), prefix) or {}
            for upload in page.get("Uploads", ()):
                if upload["Initiated"] < before:
                    found[upload["UploadId"]] = upload["Key"][start:]
            if not page.get("IsTruncated"):
                return found
            arguments["KeyMarker"] = page["NextKeyMarker"]
            arguments["UploadIdMarker"] = page["NextUploadIdMarker"]

    def abort_upload(self, key: str, upload_id: str) -> None:
        target = {**self._target(key), "UploadId": upload_id}
        self._request(lambda: self.client.abort_multipart_upload(**target), key, "written")

    def uploaded_bytes(self, key: str, upload_id: str) -> int:
        """Return the bytes of the first thousand parts of an unfinished upload."""
        target = {**self._target(key), "UploadId": upload_id}
        page = self._request(lambda: self.client.list_parts(**target), key) or {}
        return sum(part["Size"] for part in page.get("Parts", ()))

    def _upload_part(self, target: dict[str, Any], number: int, data: bytes, key: str) -> str:
        arguments = {**target, "PartNumber": number, "Body": data}
        return self._write(lambda: self.client.upload_part(**arguments)["ETag"], key)

    def windows(self, key: str, num_bytes: int) -> Iterator[bytes]:
        """Yield the content window by window; raise FileNotFoundError if there is no such object."""
        for start in range(0, num_bytes, WINDOW_BYTES):
            end = min(start + WINDOW_BYTES, num_bytes)

            def once(start: int = start, end: int = end) -> bytes:
                byte_range = f"bytes={start}-{end - 1}"
                data = self.client.get_object(**self._target(key), Range=byte_range)["Body"].read()
                if len(data) != end - start:
                    raise OSError(f"the body has {len(data)} of {end - start} bytes")
                return data

            window = self._request(once, key)
            if window is None:
                raise FileNotFoundError(self.address_of(key))
            yield window

    def sha256(self, key: str, num_bytes: int) -> str:
        sha256 = hashlib.sha256()
        for window in self.windows(key, num_bytes):
            sha256.update(window)
        return sha256.hexdigest()

    def copy(self, key: str, to: str) -> None:
        """Copy a small object within the bucket."""
        arguments = {**self._target(to), "CopySource": self._target(key)}
        self._request(lambda: self.client.copy_object(**arguments), to, "written")

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects in this order; ignore those that do not exist."""
        for key in keys:
            self._delete(key)

    def _delete(self, key: str) -> None:
        self._request(lambda: self.client.delete_object(**self._target(key)), key, "written")

    def _pages(self, prefix: str, delimiter: str) -> Iterator[dict[str, Any]]:
        arguments = {"Bucket": self.name, "Prefix": self._full_key(prefix), "Delimiter": delimiter}
        while True:
            page = self._request(lambda: self.client.list_objects_v2(**arguments), prefix) or {}
            yield page
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def _target(self, key: str) -> dict[str, Any]:
        return {"Bucket": self.name, "Key": self._full_key(key)}

    def _full_key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _write(self, action: Callable[[], Result], key: str) -> Result:
        """Return the result of a write; raise FileNotFoundError if the server answers 404."""
        result = self._request(action, key, "written")
        if result is None:
            raise FileNotFoundError(self.address_of(key))
        return result

    def _request(self, action: Callable[[], Result], key: str, verb: str = "read") -> Result | None:
        """Return the result of the action, with retries; None if there is no such object.

        Raises ConditionFailed if the condition of a write does not hold.
        """
        _ = self.client  # names the package to install if botocore is missing
        from botocore.exceptions import ClientError

        def once() -> tuple[Result | None, bool]:
            try:
                return action(), True
            except ClientError as error:
                code = str(error.response.get("Error", {}).get("Code"))
                status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
                if code in _GONE or (status == "404" and code != "NoSuchBucket"):
                    return None, True
                if {code, status} & set(_FAILED_CONDITION):
                    return None, False
                if {code, status} & set(_BAD_CREDENTIALS):
                    raise PermissionError(code) from error
                if {code, status} & set(_NOT_UNDERSTOOD):
                    raise UserError(
                        f"storage={self.address}: the store refuses a request ({code}: {error}); name an "
                        "existing bucket in a store that supports conditional writes"
                    ) from error
                raise

        result, condition_holds = with_retries(once, self.address_of(key), verb)
        if not condition_holds:
            raise ConditionFailed(self.address_of(key))
        return result


def _pieces(path: Path, num_bytes: int) -> Iterator[bytes]:
    piece_bytes = max(PART_BYTES, -(-num_bytes // _MAX_PARTS))
    with path.open("rb") as file:
        while piece := file.read(piece_bytes):
            yield piece
