"""Options of the parity tests, tests side by side, signals as a terminal's programs have them."""

import signal
from collections.abc import Iterator

import pytest


def pytest_addoption(parser):
    parser.addoption("--tiling", help="a file of tiling cases (default: tests/data/tiling.json)")
    parser.addoption("--golden", help="a folder of parity cases (default: tests/data/golden)")


@pytest.hookimpl(tryfirst=True)  # before xdist writes the groups into the names
def pytest_collection_modifyitems(items):
    """Where tests run in two processes (`make test`), those of a file share one, for they share what its
    fixtures made; so do all that look at the one run of the pipeline."""
    for item in items:
        shared = "pipeline" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("pipeline" if shared else item.location[0]))


def pytest_collection_finish(session):
    """xdist groups by what it appends to the names, and says nothing where it could not."""
    if getattr(session.config.option, "loadgroup", False):
        alone = [item.nodeid for item in session.items if "@" not in item.nodeid]
        if alone:
            raise pytest.UsageError(f"xdist left {len(alone)} tests without their group: {alone[0]} ..")


@pytest.fixture
def terminal_signals() -> Iterator[None]:
    """SIGINT and SIGHUP not ignored, here and in started programs: `nohup` and a shell's `&` ignore them."""
    asked = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in asked.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
