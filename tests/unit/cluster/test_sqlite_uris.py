"""URIs of sqlite databases: SQLAlchemy opens the path that was meant, and we read it back."""

from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from cluster.site import Site
from cluster.sqlite_uris import sqlite_path, sqlite_uri

NAMES = [
    "plain",
    "a b",
    "a%20b",
    "a?b",
    "a#b",
    "50%",
    "%2F",
    "a+b&c=d",
    "ä",
    "x@y:z",
    "a;b",
    'q"q',
    "[x]",
    "a\nb",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_comes_back_from_its_uri_and_sqlalchemy_opens_it(name, tmp_path):
    site = Site(storage=tmp_path / name)
    path = tmp_path / name / "mlflow.db"
    assert make_url(site.tracking_uri).database == str(path)
    assert sqlite_path(site.tracking_uri) == path
    assert site.tracking_address == site.tracking_uri, "nothing in it looks like a password"


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:////srv/a%20b/m.db",
        "sqlite:////srv/m.db?timeout=30&x=1",
        "sqlite:///m.db",
        "sqlite+pysqlite:////srv/m%3F.db",
    ],
)
def test_a_uri_of_a_site_file_is_read_as_sqlalchemy_reads_it(uri):
    assert str(sqlite_path(uri)) == make_url(uri).database


@pytest.mark.parametrize(
    "uri", ["http://host:5000", "postgresql://me@host/m", "sqlite://", "sqlite:///:memory:"]
)
def test_only_a_database_in_a_file_has_a_path(uri):
    assert sqlite_path(uri) is None


def test_a_usual_path_looks_like_itself():
    assert sqlite_uri(Path("/srv/my runs/mlflow.db")) == "sqlite:////srv/my runs/mlflow.db"
