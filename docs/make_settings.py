"""Write docs/settings.md, the reference of every key of pipeline and site files, from the typed configs.

`python docs/make_settings.py` writes the page; `--check` exits with 1 if it is out of date. Descriptions are
the docstrings below the fields of the configs.
"""

import argparse
import ast
import inspect
import itertools
import json
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.site import Site
from pipeline.config.graph import JOINT, pipeline_graph
from pipeline.config.pipeline_file import PipelineConfig, config_class

PAGE = Path(__file__).with_name("settings.md")
HEAD = """# Settings

Every key of a pipeline file (what is computed) and of a site file (where it runs). This page is
generated from the code by `make docs`; the descriptions are the docstrings of the fields.

`--set consistency.optimizer.learning_rate=1e-5` overrides a key of the pipeline file. An unknown key
is an error that names the nearest known one.
"""
PIPELINE = """## Pipeline file

Everything here except `experiment` and `quality_gate` decides the results: it enters the fingerprints
of the stages that read it. A stage that draws random numbers has its own `seed`; if the file leaves it
out, the stage uses the pipeline's. Only `inputs` is required. Besides the keys of the first table a file
may have one block per stage, and `joint`.
"""
SITE = """## Site file

Nothing here changes what is computed, only where it runs, how fast, and in how much memory. One
exception: `ratio.dtype` and `evaluate.dtype`, if the pipeline file leaves them out, depend on
`gpus_per_worker`. `sites/local.yaml` is the default.
"""
NAMES = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    type(None): "null",
}
BOUNDS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}


def page() -> str:
    """Return the whole page as Markdown."""
    graph = pipeline_graph()
    config = config_class(graph)
    documented: dict[type[BaseModel], str] = {}
    parts = [HEAD, PIPELINE, *_tables(PipelineConfig, "", documented)]
    for spec in graph.stages:
        parts += _tables(config.model_fields[spec.name].annotation, spec.name, documented)
    joint = _block(config.model_fields[JOINT].annotation)
    assert joint is not None
    parts += _tables(joint, JOINT, documented)
    parts += [SITE, *_tables(Site, "", documented)]
    return "\n".join(parts)


def _tables(model: type[BaseModel], path: str, documented: dict[type[BaseModel], str]) -> Iterator[str]:
    """Yield heading and table of a block of keys, then those of the blocks in it.

    `documented` maps the models that have a table already to their path; they are referred to.
    """
    yield f"### `{path}`\n\n{_first_line(model)}\n" if path else "The file:\n"
    if model in documented:
        yield f"The same keys as `{documented[model]}`.\n"
        return
    documented[model] = path
    blocks, rows = {}, []
    base = next((documented[parent] for parent in model.__mro__[1:] if parent in documented), None)
    own_fields = model.model_fields.items()
    if base is not None:
        yield f"The keys of `{base}`, and with another default or new:\n"
        own_fields = [(name, field) for name, field in own_fields if name in model.__annotations__]
    docstrings = _docstrings(model)
    for name, field in own_fields:
        block = _block(field.annotation)
        key = f"{path}.{name}" if path else name
        if block is not None:
            blocks[key] = block
            rows.append(f"| `{name}` | block | {_default(field, is_block=True)} | see `{key}` below |")
            continue
        description = " ".join(docstrings.get(name, "").split()).replace("|", "\\|")
        assert description, f"{model.__name__}.{name} has no docstring below it"
        if (several := _several_blocks(field.annotation)) is not None:
            index, one = several
            blocks[key + index] = one
            description += f" Keys: see `{key}{index}` below."
        default = "the pipeline's" if path and name == "seed" and field.is_required() else _default(field)
        rows.append(f"| `{name}` | {_type(field)} | {default} | {description} |")
    if rows:
        yield "| key | type | default | what it does |\n|---|---|---|---|"
        yield "\n".join(rows) + "\n"
    for key, block in blocks.items():
        yield from _tables(block, key, documented)


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings below the fields of a model and of its bases, by field.

    pydantic could read them, but it would do so at every import: half of the time of a command's imports.
    """
    docstrings = {}
    for part in reversed(model.__mro__[: model.__mro__.index(BaseModel)]):
        try:
            [source] = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        except OSError:  # made by pydantic.create_model
            continue
        assert isinstance(source, ast.ClassDef)
        for field, below in itertools.pairwise(source.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                docstrings[ast.unparse(field.target)] = ast.literal_eval(below.value)
    return docstrings


def _first_line(model: type[BaseModel]) -> str:
    """Return the first paragraph of a model's docstring."""
    return " ".join((model.__doc__ or "").strip().split("\n\n")[0].split())


def _block(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a field that is a block of keys, also of one that may be null."""
    choices = [choice for choice in _choices(annotation) if choice is not type(None)]
    if len(choices) == 1 and isinstance(choices[0], type) and issubclass(choices[0], BaseModel):
        return choices[0]
    return None


def _several_blocks(annotation: Any) -> tuple[str, type[BaseModel]] | None:
    """Return how one block of a list or mapping of blocks is written, and its model."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (list, dict) and (block := _block(arguments[-1])) is not None:
        return ("[]" if origin is list else ".NAME"), block
    return None


def _choices(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _type(field: FieldInfo) -> str:
    names = " or ".join(_name(choice) for choice in _choices(field.annotation))
    bounds = []
    for constraint in field.metadata:
        if type(constraint) in BOUNDS:
            sign, attribute = BOUNDS[type(constraint)]
            bounds.append(f"{sign} {getattr(constraint, attribute):g}")
        elif isinstance(constraint, MinLen):
            bounds.append("not empty")
    return ", ".join([names, *bounds])


def _name(annotation: Any) -> str:
    if annotation in NAMES:
        return NAMES[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`".replace('"', "") for value in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return "list of " + ", ".join(_name(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"list of {_name(arguments[0])}"
    if origin is dict:
        return (
            "mapping" if arguments[1] is Any else f"mapping of {_name(arguments[0])} to {_name(arguments[1])}"
        )
    if origin is typing.Annotated:
        return _name(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block"
    raise TypeError(f"{annotation} has no name yet; add it to docs/make_settings.py")


def _default(field: FieldInfo, *, is_block: bool = False) -> str:
    if field.is_required():
        return "required" if not is_block else ""
    if is_block:
        return "null" if field.default is None else ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Path):
        return f"`{value}`"
    return f"`{json.dumps(value, default=list)}`".replace('"', "") if value != "" else "empty"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="say whether the page is up to date; write nothing"
    )
    options = parser.parse_args()
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.name} is out of date; run: make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
