"""The tiny pipeline on an object store: a project whose storage is a bucket of a real S3 server."""

import json
import shutil
import subprocess
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

    def stored_outputs(self) -> dict[str, bytes]:
        """`<stage>/<fingerprint>/output/<name>` -> content of every part that a parts.json names."""
        objects, found = self.objects(), {}
        for key, data in objects.items():
            stage, _, name = key.rpartition("/")
            if name == "parts.json" and "superseded" not in key:
                for files in json.loads(data)["parts"].values():
                    for file, facts in files.items():
                        place = f"parts/{stage}/{facts['sha256']}/{file.rpartition('/')[2]}"
                        found[f"{stage}/output/{file}"] = objects[place]
        return dict(sorted(found.items()))

    def key_of(self, stage: str, name: str) -> str:
        """The key of the bytes of a published file."""
        for key, data in self.objects().items():
            if key.startswith(f"{stage}/") and key.endswith("/parts.json"):
                for files in json.loads(data)["parts"].values():
                    if name in files:
                        folder = key.removesuffix("/parts.json")
                        return f"parts/{folder}/{files[name]['sha256']}/{name.rpartition('/')[2]}"
        raise KeyError(name)

    def outputs_are_whole(self) -> bool:
        """Whether every part that is named is there; a KeyError says which is not."""
        return bool(self.stored_outputs())

    def delete(self, key: str) -> None:
        key = f"{self.address.removeprefix(f's3://{BUCKET}/')}/{key}"
        s3_client(self.proxy).delete_object(Bucket=BUCKET, Key=key)

    def vico_slowly(self, command: str) -> None:
        process = self.start(command)
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 0, (output, errors)

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
