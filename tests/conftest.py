"""Options of the parity tests."""


def pytest_addoption(parser):
    parser.addoption("--tiling", help="a file of tiling cases (default: tests/data/tiling.json)")
