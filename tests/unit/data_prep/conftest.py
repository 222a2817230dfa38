"""The prompt format of the tiny model, for all tests of data preparation."""

import pytest

from vico.prompt import PromptFormat


@pytest.fixture(scope="session")
def prompt_format(tmp_path_factory: pytest.TempPathFactory) -> PromptFormat:
    from tests.tiny_model import make_tiny_model
    from vico.prompt import load_prompt_format

    return load_prompt_format(make_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))
