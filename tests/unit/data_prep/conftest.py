import pytest

from vico.prompt import PromptFormat


@pytest.fixture(scope="session")
def prompt_format(tmp_path_factory) -> PromptFormat:
    from tests.tiny_model import make_tiny_model
    from vico.prompt import load_prompt_format

    return load_prompt_format(make_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))
