"""Where a stage keeps what its frozen parts compute. Importing it is light."""

from pathlib import Path

from stages.parts import Parts

ARRAY_FILE = "values.npy"
PARTIAL = ".partial-"
"""In the name of a file that is still written."""


def kept_folder(parts: Parts) -> Path:
    """Return the folder of all that a stage keeps while it works."""
    return parts.folder / "kept"


def features_folder(parts: Parts) -> Path:
    """Return the folder of the vision features."""
    return kept_folder(parts) / "features"


def states_folder(parts: Parts) -> Path:
    """Return the folder of the reference's hidden states."""
    return kept_folder(parts) / "reference"


def kept_bytes_on_disk(parts: Parts) -> int:
    """Return the bytes of what is kept already."""
    return sum(path.stat().st_size for path in kept_folder(parts).glob(f"*/[!.]*/{ARRAY_FILE}"))


def remove_half_kept(parts: Parts) -> None:
    """Remove the files that ranks were writing when they ended. Call it while no rank runs."""
    for leftover in parts.below(f"{kept_folder(parts).name}/*/.*{PARTIAL}*"):
        parts.delete(leftover)
