"""The packages that this project needs, as they are installed: name, version, licence.

What else is in the environment does not count. `python -m tests.supply` prints the list.
"""

import re
import tomllib
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_BY_CLASSIFIER = {
    "Academic Free License (AFL)": "AFL-2.1",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
}
_BY_TEXT = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache-2.0": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "mit": "MIT",
    "mit license": "MIT",
    "3-clause bsd": "BSD-3-Clause",
    "bsd 3-clause": "BSD-3-Clause",
}


@dataclass(frozen=True)
class Package:
    """An installed package; `licences` are identifiers of SPDX, empty if its metadata name none."""

    name: str
    version: str
    licences: tuple[str, ...]


def normal(name: str) -> str:
    """Return the name of a package as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named_packages() -> list[Requirement]:
    """Return what pyproject.toml names, all extras included."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for texts in lists for text in texts]


def needed_packages() -> list[Package]:
    """Return every installed package that vico needs, with all extras, directly or not, by name."""
    waiting, seen = named_packages(), dict[str, Package]()
    asked = {(normal(required.name), extra) for required in waiting for extra in ("", *required.extras)}
    while waiting:
        wanted = waiting.pop()
        try:
            installed = distribution(wanted.name)
        except PackageNotFoundError:
            continue  # of another platform, or of an extra that is not installed
        name = normal(wanted.name)
        seen[name] = Package(name, installed.version.partition("+")[0], licences(installed))
        for required in map(Requirement, installed.requires or ()):
            marker, extras = required.marker, ("", *wanted.extras)
            new = {(normal(required.name), extra) for extra in ("", *required.extras)} - asked
            if new and (marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)):
                asked |= new
                waiting.append(required)
    return sorted(seen.values(), key=lambda package: package.name)


def licences(installed: Distribution) -> tuple[str, ...]:
    """Return the SPDX identifiers of a package's expression, else of its text or its classifiers."""
    about = installed.metadata
    expression, text = about.get("License-Expression"), (about.get("License") or "").strip()
    if expression is None and re.fullmatch(r"[\w.+-]+( (AND|OR|WITH) [\w.+-]+)*", text) and "-" in text:
        expression = text
    if expression is not None:
        words = re.findall(r"[\w.+-]+", expression)
        return tuple(sorted({word for word in words if word not in ("AND", "OR", "WITH")}))
    if text.lower() in _BY_TEXT:
        return (_BY_TEXT[text.lower()],)
    names = (
        line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or () if line.startswith("License")
    )
    return tuple(sorted({_BY_CLASSIFIER.get(name, name) for name in names if name != "OSI Approved"}))


if __name__ == "__main__":
    for package in needed_packages():
        print(f"{package.name}=={package.version}\t{' '.join(package.licences)}")
