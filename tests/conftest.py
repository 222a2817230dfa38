"""Options of the parity tests."""


def pytest_addoption(parser):
    parser.addoption("--tiling", help="a file of tiling cases (default: tests/data/tiling.json)")
    parser.addoption("--golden", help="a folder of parity cases (default: tests/data/golden)")
