"""Known values of ANLS and exact match."""

import pytest

from vico.inference.scoring import exact_match, similarity


@pytest.mark.parametrize(
    "prediction, answer, expected",
    [
        ("42", "42", 1.0),
        ("Paris", "paris", 1.0),
        ("  a  b ", "a b", 1.0),
        ("", "", 1.0),
        ("", "word", 0.0),
        ("sitting", "kitten", 1 - 3 / 7),
        ("abcd", "abxy", 0.0),  # distance 2 / 4 is not below the cut
        ("abcde", "abcxy", 0.6),
        ("1234", "9999", 0.0),
        ("STRASSE", "Straße", 1.0),
    ],
)
def test_anls(prediction, answer, expected):
    assert similarity(prediction, answer) == pytest.approx(expected)
    assert similarity(answer, prediction) == pytest.approx(expected)


def test_exact_match_depends_on_case_but_not_on_white_space():
    assert exact_match(" 4 2\n", "4 2")
    assert not exact_match("Paris", "paris")
    assert not exact_match("42", "4 2")
