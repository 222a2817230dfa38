"""The folder that the project's packages are in."""

from pathlib import Path

PROJECT_FOLDER = Path(__file__).parent.resolve().parent
"""The root of a checkout; in an installed wheel the folder of all installed packages."""
