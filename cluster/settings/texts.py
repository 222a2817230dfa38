"""Rules about texts in a site file: what a shell, Slurm or Kubernetes would misread or refuse.

Each raises ValueError with field, value and remedy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_PATHS = ("storage", "work", "ray.temp_dir", "tracking.")
_SEVERAL_LINES = ("environment.", "slurm.setup.", "kuberay.annotations.")
_MAY_BE_EMPTY = (*_SEVERAL_LINES, "kuberay.labels.", "hook.command.")
_PASSED_ON = re.compile(r"kuberay\.deletion_rules\.|(kuberay\.head|nodes\.\d+)\.(tolerations|selector)\.")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_UNWRITABLE = re.compile(r"[\x00\ud800-\udfff]")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_PART = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_OWN_VARIABLES = {
    "MLFLOW_RUN_ID": "runs have MLflow runs of their own",
    "PYTHONUNBUFFERED": "jobs set it",
    "RAY_ADDRESS": "kind and ray.address say which Ray is used",
    "RAY_JOB_STOP_WAIT_TIME_S": "jobs set it",
    "VICO_JOB": "jobs set it",
}
_OWN_VARIABLES_OF_SLURM = {
    "RAY_AUTH_MODE": "each job has a token of its own",
    "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT": "set slurm.start_timeout_s",
    "RAY_TMPDIR": "set slurm.node_folder",
    "RAY_raylet_start_wait_time_s": "set slurm.start_timeout_s",
}
"""Variable -> why a site cannot set it."""


def refuse_unusable_texts(kind: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a text with a line break or another control character, which would end a line of a
    script, and for an empty one. Only on Slurm are paths part of a script's lines."""
    may_have_lines = _SEVERAL_LINES if kind == "slurm" else (*_SEVERAL_LINES, *_PATHS)
    for field, text in _texts(settings):
        shown = field if field.startswith("environment.") else f"{field}={text!r}"
        if _UNWRITABLE.search(text) or (_CONTROL.search(text) and not field.startswith(may_have_lines)):
            raise ValueError(f"{shown} has a line break or a control character; write it without")
        if not text.strip() and not field.startswith(_MAY_BE_EMPTY) and not _PASSED_ON.match(field):
            raise ValueError(f"{shown} is empty; give a value, or leave {field} out")


def _texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, text) of all texts in a nested value, and of the names in it."""
    if isinstance(value, str | Path):
        yield field, str(value)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if _CONTROL.search(str(name)) or not str(name).strip():
                yield f"a name in {field}", str(name)
            yield from _texts(inner, f"{field}.{name}" if field else str(name))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{field}.{number}")


def refuse_variables(kind: str, environment: Mapping[str, str]) -> None:
    """Raise ValueError for a name that a shell cannot export, and for a variable that jobs set themselves."""
    own = _OWN_VARIABLES | (_OWN_VARIABLES_OF_SLURM if kind == "slurm" else {})
    for name in environment:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(
                f"environment: {name!r} is not the name of a variable; use letters, digits and _ only"
            )
        if name in own:
            raise ValueError(
                f"environment.{name} would have no effect with kind: {kind}: {own[name]}; leave it out"
            )


def refuse_kubernetes_name(field: str, name: str, *, max_chars: int = 253) -> None:
    """Raise ValueError for what Kubernetes takes as the name of no object."""
    if not _SUBDOMAIN.fullmatch(name) or len(name) > max_chars or (max_chars == 63 and "." in name):
        raise ValueError(
            f"{field}={name!r} is not a name of Kubernetes; it has lower-case letters, digits and -, and at "
            f"most {max_chars} characters"
        )


def refuse_labels(field: str, labels: Mapping[str, str], *, are_annotations: bool = False) -> None:
    """Raise ValueError for labels (or annotations, whose values may be any text) that Kubernetes refuses."""
    for key, text in labels.items():
        prefix, slash, name = key.rpartition("/")
        if not _is_label_part(name) or (slash and not _SUBDOMAIN.fullmatch(prefix)):
            raise ValueError(
                f"{field}: {key!r} is not a key of Kubernetes; write NAME or PREFIX/NAME, with at most 63 "
                "letters, digits, -, _ and . in NAME"
            )
        if text and not are_annotations and not _is_label_part(text):
            raise ValueError(
                f"{field}.{key}={text!r} is not a value of a label; it has letters, digits, -, _ and ., at "
                "most 63, and a letter or digit at both ends"
            )


def _is_label_part(text: str) -> bool:
    return len(text) <= 63 and _LABEL_PART.fullmatch(text) is not None
