"""Passwords in URLs are found and removed."""

import logging

import pytest

from cluster.passwords import MaskingFormatter, password_fields, without_passwords


@pytest.mark.parametrize(
    "text, masked",
    [
        ("http://me:secret@host:5000/x", "http://host:5000/x"),
        (
            "failed for 'mysql+pymysql://me:se%20cret@db/vico' twice",
            "failed for 'mysql+pymysql://db/vico' twice",
        ),
        ("https://token@host and http://a:b@c", "https://host and http://c"),
        ("postgresql://mlflow:a/b@db/x", "postgresql://db/x"),
        ("no answer from 'mysql://me:/a//b:c/@[::1]:3306/x'", "no answer from 'mysql://[::1]:3306/x'"),
        ("redis://:a/b@host:6379 http://me:c@d", "redis://host:6379 http://d"),
        ("http://host/path@x", "http://host/path@x"),
        ("s3://bucket/a@b:c", "s3://bucket/a@b:c"),
        ("http://host:5000/me@mail.org", "http://host:5000/me@mail.org"),
        ("http://[::1]:5000/me@mail.org", "http://[::1]:5000/me@mail.org"),
        ("s3://bucket:x,s3://me@y", "s3://bucket:x,s3://y"),
        ("a path /x/y@z and me@mail.org", "a path /x/y@z and me@mail.org"),
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
        ("https://host/x?a=1&token=se.cret-1&b=2 again", "https://host/x?a=1&token=***&b=2 again"),
        (
            "'s3://b/k?X-Amz-Credential=AKIA/x&X-Amz-Signature=12ab'",
            "'s3://b/k?X-Amz-Credential=***&X-Amz-Signature=***'",
        ),
        ("blob?sv=2024&sig=a%2Bb%3D#top", "blob?sv=2024&sig=***#top"),
        ("{'Authorization': 'Bearer hf_abcDEF123456'}", "{'Authorization': 'Bearer ***'}"),
        ("authorization: Basic bWU6c2VjcmV0", "authorization: Basic ***"),
        ("got Bearer eyJhbGciOi.x.y1, not valid", "got Bearer ***, not valid"),
        ("basic functionality; the bearer of bad news", "basic functionality; the bearer of bad news"),
        ("?max_tokens=5&tokens_full=256&signal=9", "?max_tokens=5&tokens_full=256&signal=9"),
    ],
)
def test_only_user_and_password_are_removed(text, masked):
    assert without_passwords(text) == masked


def test_the_fields_with_passwords_are_named():
    content = {"a": {"b": ["x", "s3://me:secret@bucket"]}, "c": "http://host", "d": 5, "e": "http://me@host"}
    content |= {"f": "postgresql://mlflow:a/b@db/x", "g": "http://host:5000/me@x", "h": "s3://bucket/a@b:c"}
    assert password_fields(content) == ["a.b.1", "f"]


def test_values_of_secret_variables_are_masked_wherever_they_are(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    monkeypatch.setenv("MY_DB_PASSWORD", "hf_planted-and-longer")
    monkeypatch.setenv("SHORT_TOKEN", "step")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-false")
    text = "a hf_planted-and-longer b hf_planted, step false-false"
    assert without_passwords(text) == "a *** b ***, step false-false"


def test_urls_with_tokens_are_fields_with_passwords():
    assert password_fields({"a": "https://h/?token=x", "b": "a text?token=x", "c": "https://h/?page=2"}) == [
        "a"
    ]


def test_tracebacks_in_logs_have_no_password():
    try:
        raise ValueError("http://me:secret@host")
    except ValueError as error:
        record = logging.LogRecord(
            "x", 30, "x", 1, "no %s", ("http://a:secret@b",), (ValueError, error, None)
        )
    line = MaskingFormatter("%(message)s").format(record)
    assert "http://host" in line and "secret" not in line
