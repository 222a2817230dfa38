"""The real material of the demo, divided into groups: numbers, prose, code, tables, photographs.

Everything that a model could memorize belongs to exactly one group, and a record uses only its own group. So
a split by group never has the same photograph, passage, table or number on two sides. Single words come from
one lexicon that all groups share.
"""

import csv
import gzip
import re
import zlib
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from vico.errors import missing_package

NUM_GROUPS = 96
_WORDS_PER_PASSAGE = 90
_LINES_PER_LISTING = 24
_BARS_PER_TABLE = 5
_FIRST_PHOTO_GROUP = 4  # with this value the default split has photographs on all three sides
_LONGEST_SIDE = 640  # pixels; crops of one tile need no larger photographs
# Files in the wheels of the packages; nothing is downloaded. Their licences: public domain, CC0 or "no known
# copyright restrictions" (scikit-image, matplotlib); CC BY 2.0 (china.jpg by danielbuechele, flower.jpg by
# vultilion; scikit-learn).
_PHOTOGRAPHS = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/brick.png"),
    ("skimage", "data/camera.png"),
    ("skimage", "data/cell.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/clock_motion.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/coins.png"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/gravel.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/moon.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/retina.jpg"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)
# (package, file, lines to skip, column, factor): columns whose values times the factor have two digits.
_COLUMNS = (
    ("sklearn", "datasets/data/iris.csv", 1, 0, 10),  # sepal length, mm
    ("sklearn", "datasets/data/iris.csv", 1, 1, 10),  # sepal width, mm
    ("sklearn", "datasets/data/iris.csv", 1, 2, 10),  # petal length, mm
    ("sklearn", "datasets/data/wine_data.csv", 1, 0, 1),  # alcohol, per cent
    ("sklearn", "datasets/data/wine_data.csv", 1, 1, 10),  # malic acid
    ("sklearn", "datasets/data/wine_data.csv", 1, 3, 1),  # alcalinity of ash
    ("sklearn", "datasets/data/wine_data.csv", 1, 6, 10),  # flavanoids
    ("sklearn", "datasets/data/wine_data.csv", 1, 9, 10),  # colour intensity
    ("sklearn", "datasets/data/breast_cancer.csv", 1, 0, 1),  # mean radius
    ("sklearn", "datasets/data/breast_cancer.csv", 1, 1, 1),  # mean texture
    ("sklearn", "datasets/data/breast_cancer.csv", 1, 22, 0.5),  # worst perimeter, half
    ("sklearn", "datasets/data/diabetes_data_raw.csv.gz", 0, 0, 1),  # age, years
    ("sklearn", "datasets/data/diabetes_data_raw.csv.gz", 0, 2, 1),  # body mass index
    ("sklearn", "datasets/data/diabetes_data_raw.csv.gz", 0, 3, 0.5),  # blood pressure, half
    ("matplotlib", "mpl-data/sample_data/msft.csv", 1, 2, 1),  # Microsoft, daily high, dollars
    ("matplotlib", "mpl-data/sample_data/Stocks.csv", 2, 1, 1),  # IBM, monthly, dollars
    ("matplotlib", "mpl-data/sample_data/Stocks.csv", 2, 4, 1),  # Xerox, monthly, dollars
)
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
_NOT_PROSE = ("::=", ">>>", "**", "==", "--", "+-", "    ")
_LISTINGS = (
    "ast.py",
    "calendar.py",
    "fractions.py",
    "heapq.py",
    "queue.py",
    "shlex.py",
    "statistics.py",
    "textwrap.py",
)


@cache
def package_folder(package: str) -> Path:
    """Return the folder of an installed package without importing it; importing matplotlib takes 0.3 s."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise missing_package("the demo", _DISTRIBUTIONS.get(package, package))
    return Path(next(iter(spec.submodule_search_locations)))


def _stable_hash(text: str) -> int:
    return zlib.crc32(text.encode())


@cache
def group_numbers(group: int) -> tuple[int, ...]:
    """Return the numbers from 10 to 9999 that belong to a group, about a hundred."""
    return tuple(
        number for number in range(10, 10_000) if _stable_hash(f"number {number}") % NUM_GROUPS == group
    )


@lru_cache(maxsize=1)
def _passages() -> tuple[str, ...]:
    """Return passages of 90 words from the Python reference (`pydoc_data.topics`), without its listings."""
    from pydoc_data.topics import topics

    words: list[str] = []
    # Some topics repeat paragraphs of others word for word; no passage may occur twice.
    paragraphs = dict.fromkeys(
        paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n")
    )
    for paragraph in paragraphs:
        if paragraph.isascii() and len(paragraph) > 80 and not any(mark in paragraph for mark in _NOT_PROSE):
            words += [word for word in paragraph.replace('"', "").split() if len(word) <= 16]
    step = _WORDS_PER_PASSAGE
    return tuple(" ".join(words[i : i + step]) for i in range(0, len(words) - step + 1, step))


@lru_cache(maxsize=1)
def _listings() -> tuple[tuple[str, ...], ...]:
    """Return listings of 24 lines of the standard library, without comments, with their indentation."""
    folder = Path(re.__file__).parent.parent
    lines: list[str] = []
    for name in _LISTINGS:
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            if line.strip() and line.isascii() and not line.lstrip().startswith("#"):
                lines.append(line.rstrip())
    step = _LINES_PER_LISTING
    return tuple(tuple(lines[i : i + step]) for i in range(0, len(lines) - step + 1, step))


@lru_cache(maxsize=1)
def _tables() -> tuple[tuple[int, ...], ...]:
    """Return tables of five consecutive values of a real column, rounded to two digits."""
    tables: list[tuple[int, ...]] = []
    for package, file, skip, column, factor in _COLUMNS:
        path = package_folder(package) / file
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        values = []
        for row in list(csv.reader(text.splitlines(), delimiter="," if "," in text else " "))[skip:]:
            value = round(float(row[column]) * factor) if len(row) > column and row[column] else 0
            if 10 <= value <= 99:
                values.append(value)
        step = _BARS_PER_TABLE
        tables += [tuple(values[i : i + step]) for i in range(0, len(values) - step + 1, step)]
    return tuple(dict.fromkeys(tables))


def group_passages(group: int) -> tuple[str, ...]:
    """Return the passages of a group, each 90 words of prose."""
    return _passages()[group::NUM_GROUPS]


def group_listings(group: int) -> tuple[tuple[str, ...], ...]:
    """Return the code listings of a group, each a run of source lines."""
    return _listings()[group::NUM_GROUPS]


def group_tables(group: int) -> tuple[tuple[int, ...], ...]:
    """Return the tables of a group, each five two-digit values."""
    return _tables()[group::NUM_GROUPS]


@lru_cache(maxsize=1)
def photo_groups() -> tuple[int, ...]:
    """Return the groups that have a photograph, in the order of `_PHOTOGRAPHS`."""
    return tuple(_FIRST_PHOTO_GROUP + i * NUM_GROUPS // len(_PHOTOGRAPHS) for i in range(len(_PHOTOGRAPHS)))


@lru_cache(maxsize=len(_PHOTOGRAPHS))
def group_photograph(group: int) -> Image.Image:
    """Return the photograph of one of `photo_groups()`: RGB, at most 640 pixels per side.

    It is cached, so do not draw on it.
    """
    package, file = _PHOTOGRAPHS[photo_groups().index(group)]
    image = Image.open(package_folder(package) / file).convert("RGB")
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    return image
