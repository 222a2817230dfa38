"""Options of the parity tests, groups for parallel runs, and signals as programs in a terminal have them."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # timings are not tests
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tiling", help="a file of tiling cases (default: tests/data/tiling.json)")
    parser.addoption("--golden", help="a folder of parity cases (default: tests/data/golden)")


@pytest.hookimpl(tryfirst=True)  # before xdist writes the groups into the names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests of a file for runs in two processes (`make test`), so that they share its fixtures.

    All tests that use the one run of the pipeline are one group, too.
    """
    for item in items:
        shared = "pipeline" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("pipeline" if shared else item.location[0]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Raise UsageError when a test has no group: xdist appends groups to names and reports no failure."""
    if getattr(session.config.option, "loadgroup", False):
        ungrouped = [item.nodeid for item in session.items if "@" not in item.nodeid]
        if ungrouped:
            raise pytest.UsageError(f"xdist left {len(ungrouped)} tests without a group: {ungrouped[0]} ..")


@pytest.fixture
def terminal_signals() -> Iterator[None]:
    """Reset SIGINT and SIGHUP, which `nohup` and a shell's `&` ignore, here and in started programs."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
