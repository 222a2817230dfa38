"""The tiny pipeline on an object store: a project whose storage is a bucket of a real S3 server."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import botocore.session

from tests import s3_server
from tests.integration.tiny_pipeline.project import TinyProject
from tests.waiting import PATIENCE_S

BUCKET = "store"


class ObjectProject(TinyProject):
    """Commands of one machine, with its own working copy below its folder."""

    def __init__(
        self, folder: Path, proxy: s3_server.FaultyProxy, prefix: str = "pipelines", **environment: str
    ):
        super().__init__(folder)
        self.proxy, self.address = proxy, f"s3://{BUCKET}/{prefix}"
        self.environment = {**s3_server.environment(proxy, 20), **environment}
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
        (working_copy,) = (self.folder / "work").iterdir()
        return working_copy

    def forget(self) -> None:
        """Remove the working copy, so that this is like another machine."""
        shutil.rmtree(self.folder / "work")

    def objects(self) -> dict[str, bytes]:
        """Return the content of every object by its key below the prefix."""
        client, prefix = s3_client(self.proxy), self.address.removeprefix(f"s3://{BUCKET}/") + "/"
        contents: dict[str, bytes] = {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
            for entry in page.get("Contents", []):
                body = client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"]
                contents[entry["Key"].removeprefix(prefix)] = body.read()
        return contents

    def stored_outputs(self) -> dict[str, bytes]:
        """Return the content of every part that a parts.json lists, by
        `<stage>/<fingerprint>/output/<name>`."""
        objects, outputs = self.objects(), {}
        for key, data in objects.items():
            stage, _, name = key.rpartition("/")
            if name == "parts.json" and "superseded" not in key:
                for files in json.loads(data)["parts"].values():
                    for file, entry in files.items():
                        part_key = f"parts/{stage}/{entry['sha256']}/{file.rpartition('/')[2]}"
                        outputs[f"{stage}/output/{file}"] = objects[part_key]
        return dict(sorted(outputs.items()))

    def key_of(self, stage: str, name: str) -> str:
        """Return the key of the bytes of a published file."""
        for key, data in self.objects().items():
            if key.startswith(f"{stage}/") and key.endswith("/parts.json"):
                for files in json.loads(data)["parts"].values():
                    if name in files:
                        folder = key.removesuffix("/parts.json")
                        return f"parts/{folder}/{files[name]['sha256']}/{name.rpartition('/')[2]}"
        raise KeyError(name)

    def outputs_are_whole(self) -> bool:
        """Return True if every listed part is in the store; a KeyError names a missing one."""
        return bool(self.stored_outputs())

    def delete(self, key: str) -> None:
        key = f"{self.address.removeprefix(f's3://{BUCKET}/')}/{key}"
        s3_client(self.proxy).delete_object(Bucket=BUCKET, Key=key)

    def vico_slowly(self, command: str) -> None:
        process = self.start(command)
        output, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, (output, errors)

    def put(self, key: str, data: bytes) -> None:
        key = f"{self.address.removeprefix(f's3://{BUCKET}/')}/{key}"
        s3_client(self.proxy).put_object(Bucket=BUCKET, Key=key, Body=data)


def s3_client(proxy: s3_server.FaultyProxy) -> Any:
    """Return a client that goes straight to the server, past the proxy."""
    return botocore.session.Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=f"http://{s3_server.HOST}:{proxy.target_port}",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
