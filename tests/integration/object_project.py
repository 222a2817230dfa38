"""The tiny pipeline on an object store: a project whose storage is a bucket of a real S3 server."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import botocore.session

from tests import s3_server
from tests.integration.tiny_pipeline.project import TinyProject

BUCKET = "store"


class ObjectProject(TinyProject):
    """Commands of one machine, with a working copy of its own below its folder."""

    def __init__(self, folder: Path, proxy: s3_server.FaultyProxy, prefix: str = "pipelines", **more: str):
        super().__init__(folder)
        self.proxy, self.address = proxy, f"s3://{BUCKET}/{prefix}"
        self.environment = {**s3_server.environment(proxy, 20), **more}
        self.site("")

    def site(self, more: str) -> None:
        text = f"name: tiny\ntracking: {{enabled: false}}\nwork: {self.folder / 'work'}\n{more}"
        (self.folder / "site.yaml").write_text(text)

    def start(self, command: str, *arguments: str, **environment: str) -> subprocess.Popen:
        return super().start(command, *arguments, **{**self.environment, **environment})

    @property
    def storage_option(self) -> str:
        return self.address

    @property
    def storage(self) -> Path:
        """The working copy."""
        (found,) = (self.folder / "work").iterdir()
        return found

    def forget(self) -> None:
        """What another machine sees: no working copy."""
        shutil.rmtree(self.folder / "work")

    def objects(self) -> dict[str, bytes]:
        """Key below the prefix -> content of every object."""
        client, prefix = s3_client(self.proxy), self.address.removeprefix(f"s3://{BUCKET}/") + "/"
        found: dict[str, bytes] = {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
            for one in page.get("Contents", []):
                body = client.get_object(Bucket=BUCKET, Key=one["Key"])["Body"]
                found[one["Key"].removeprefix(prefix)] = body.read()
        return found

    def put(self, key: str, data: bytes) -> None:
        key = f"{self.address.removeprefix(f's3://{BUCKET}/')}/{key}"
        s3_client(self.proxy).put_object(Bucket=BUCKET, Key=key, Body=data)


def s3_client(proxy: s3_server.FaultyProxy) -> Any:
    """Straight to the server, past the proxy."""
    return botocore.session.Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=f"http://{s3_server.HOST}:{proxy.target_port}",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


@contextmanager
def faults(proxy: s3_server.FaultyProxy, fault) -> Iterator[None]:
    """While it is open the proxy asks `fault(number, handler)`."""
    before, proxy.fault = proxy.fault, fault
    try:
        yield
    finally:
        proxy.fault = before
