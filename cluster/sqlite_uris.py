"""The path of an sqlite database as a URI, and back. SQLAlchemy, which MLflow opens a database with, decodes
%XX in a URI and cuts it at `?`."""

import re
from pathlib import Path
from urllib.parse import unquote

_SCHEME = re.compile(r"sqlite(\+\w+)?:///")


def sqlite_uri(path: Path) -> str:
    """Return the URI of the database at `path`.

    Only the two characters with a meaning are quoted, so that a usual path looks like itself.
    """
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def sqlite_path(uri: str) -> Path | None:
    """Return the path of an sqlite database, as SQLAlchemy reads the URI; None for a server, another database
    or one in memory."""
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return None
    name = unquote(uri[scheme.end() :].partition("?")[0])
    return Path(name) if name not in ("", ":memory:") else None
