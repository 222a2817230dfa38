"""Where a stage keeps what its frozen parts compute. Importing it is light."""

from pathlib import Path

from stages.parts import Parts

ARRAY_FILE = "values.npy"


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
    return sum(path.stat().st_size for path in kept_folder(parts).rglob(ARRAY_FILE))
