"""Three shards with their index, for the tests of the index and the reader."""

import shutil
from pathlib import Path

import pytest

from tests.record_tars import write_shard_folder
from vico.prompt import PromptFormat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, prompt_format: PromptFormat) -> Path:
    """Three shards of 24 samples with their index, and the records they were written from in `records`."""
    root = tmp_path_factory.mktemp("shards")
    assert write_shard_folder(root, 24, 10, prompt_format) == 3
    return root


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copied")
