"""Where MLflow keeps artifacts. A database has their absolute folders, which are wrong once a store was moved
or copied.

MLflow takes the root of an experiment when it is created and has no call that changes it. The database of a
storage is ours, so that its addresses are corrected in the database itself. Does not import MLflow.
"""

import logging
import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cluster.site import Site
from cluster.sqlite_uris import sqlite_path
from pipeline.tracking.client import sqlite_lock

logger = logging.getLogger(__name__)
_FOLDER = "mlartifacts"
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("logged_model_tags", "tag_value"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("model_version_tags", "value"),
)
"""Tables and columns of MLflow's database that have addresses in a storage."""
_BUSY_S = 20.0


@dataclass(frozen=True)
class MovedRoot:
    """A root of artifacts that a database names and that belongs to the place where the store was before."""

    store: Path
    former_store: Path

    @property
    def text(self) -> str:
        return f"artifacts are kept in {self.former_store / _FOLDER}, but the store is {self.store}"


def artifact_root(site: Site, experiment: str) -> str | None:
    """Return where artifacts of a new experiment are kept; None: where the server keeps them."""
    folder, artifacts = re.sub(r"[^\w.-]", "_", experiment), site.tracking.artifacts
    if sqlite_path(site.tracking_uri) is None:
        return f"{artifacts.rstrip('/')}/{folder}" if artifacts else None
    if artifacts is None:
        artifacts = (_default_store(site) / _FOLDER).as_uri()
    elif "://" not in artifacts:
        artifacts = Path(artifacts).expanduser().absolute().as_uri()
    return f"{artifacts.rstrip('/')}/{folder}"


def moved_roots(site: Site) -> list[MovedRoot]:
    """Return the former places of the store for which MLflow's database still has artifacts.

    Only for a database that moves with its artifacts: they are beside it.
    """
    database = _own_database(site)
    if database is None or not database.is_file():
        return []
    store = _default_store(site)
    with closing(sqlite3.connect(database, timeout=_BUSY_S)) as connection:
        locations = [row[0] for row in connection.execute("SELECT artifact_location FROM experiments")]
    roots = [
        root for root in map(local_path, filter(None, locations)) if root and root.parent.name == _FOLDER
    ]
    return [
        MovedRoot(store, former)
        for former in sorted({root.parent.parent for root in roots})
        if former.resolve() != store.resolve() and _has_moved(former, store, roots, database.name)
    ]


def correct_moved_roots(site: Site) -> list[str]:
    """Make MLflow's database name the artifacts where the store is now; return a line per former place."""
    moved = moved_roots(site)
    database = _own_database(site)
    if database is None or not moved:
        return []
    opened = sqlite3.connect(database, timeout=_BUSY_S)
    with sqlite_lock(site.tracking_uri), closing(opened) as connection, connection:
        connection.execute("BEGIN IMMEDIATE")
        for root in moved:
            _replace_addresses(connection, root.former_store.as_uri(), root.store.as_uri())
            _replace_addresses(connection, str(root.former_store), str(root.store))
    lines = [f"corrected in MLflow: its {root.text}" for root in moved]
    for line in lines:
        logger.warning("%s", line)
    return lines


def lost_root(site: Site, experiment: str, location: str) -> str | None:
    """Return a line if artifacts of the experiment would be written to a place that no longer exists.

    A shared database keeps the artifacts of other stores as well, so that nothing is changed in it.
    """
    root, wanted = local_path(location), artifact_root(site, experiment)
    if sqlite_path(site.tracking_uri) is None or wanted is None or root in (None, local_path(wanted)):
        return None
    if any(folder.exists() for folder in (root, root.parent, root.parent.parent)):
        return None
    return (
        f"experiment {experiment} keeps its artifacts in {root}, and {root.parent.parent} is gone; "
        "bring that folder back, or give `experiment` another name for new runs"
    )


def local_path(location: str) -> Path | None:
    """Return the folder of an artifact location on this machine; None for another address."""
    if location.startswith("/"):
        return Path(location)
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _default_store(site: Site) -> Path:
    """Return the folder in which artifacts are kept by default: the storage.

    For an object store it is the database's folder, since its working copy has nothing on other machines.
    """
    database = sqlite_path(site.tracking_uri)
    if site.remote and database is not None:
        return database.absolute().parent
    return site.storage.resolve()


def _own_database(site: Site) -> Path | None:
    """Return the database if it and its artifacts move together, so that no other store uses it."""
    database = sqlite_path(site.tracking_uri)
    if database is None or site.tracking.artifacts is not None:
        return None
    return database if database.resolve().parent == _default_store(site).resolve() else None


def _has_moved(former: Path, store: Path, roots: list[Path], database: str) -> bool:
    """Return whether artifacts of another folder belong to the store.

    They do not if a site file once named that folder for artifacts: then it has them, and no database.
    """
    has_copies = any((store / _FOLDER / root.name).exists() for root in roots if root.parent.parent == former)
    return has_copies or (former / database).exists() or not former.exists()


def _replace_addresses(connection: sqlite3.Connection, former: str, now: str) -> None:
    for table, column in _ADDRESSES:
        connection.execute(
            f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
            (now, len(former) + 1, len(former) + 1, f"{former}/"),
        )
