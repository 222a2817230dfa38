"""Numbers from the environment."""

import pytest

from data_prep.environment import number_in_environment
from vico.errors import UserError


def test_a_variable_that_is_not_set_or_empty_has_the_default(monkeypatch):
    monkeypatch.delenv("VICO_X", raising=False)
    assert number_in_environment("VICO_X", 7) == 7
    monkeypatch.setenv("VICO_X", "")
    assert number_in_environment("VICO_X", 7) == 7
    monkeypatch.setenv("VICO_X", "1e9")
    assert number_in_environment("VICO_X", 7) == 10**9


@pytest.mark.parametrize("text", ["100GB", "60s", "nan", "inf", "-1"])
def test_anything_else_is_refused_in_one_line(monkeypatch, text):
    monkeypatch.setenv("VICO_X", text)
    with pytest.raises(UserError, match=f"VICO_X={text} in the environment") as caught:
        number_in_environment("VICO_X", 7)
    assert "\n" not in str(caught.value)
