"""The folders that the project's packages, and the files that it brings along, are in."""

from pathlib import Path

PROJECT_FOLDER = Path(__file__).parent.resolve().parent
"""The root of a checkout; in an installed wheel the folder of all installed packages."""
STARTER_FOLDER = PROJECT_FOLDER / "pipeline" / "starter"
"""Demo model, configs, example sites and constraints.txt. In a checkout these are links to its own."""
