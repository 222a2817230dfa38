"""`vico init`: write a first pipeline file, and the demo model or the other files of the quickstart."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.terminal.output import terminal
from vico.errors import Faults, UserError, one_line
from vico.shown_text import printable

if TYPE_CHECKING:
    from pipeline.commands.project_template import Records
    from stages.shard.config import ShardConfig
    from stages.shard.first_rows import CheckedFile

DEMO_MODEL = "models/small-internvl"
QUICKSTART = "configs/quickstart.yaml"
_ABLATIONS = "ablations"
"""Folder of differences from a pipeline, for a command of a checkout."""

_NOT_IN_YAML = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff\ud800-\udfff]")


def init(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The pipeline file to write.")] = Path(
        "pipeline.yaml"
    ),
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Folder with rows (JSON lines or lists, parquet, tars) and their pictures; for InternVL "
            "rows a meta.json is written to it.",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="Folder or Hub id of the model to start from.")
    ] = DEMO_MODEL,
    quickstart: Annotated[
        bool,
        typer.Option(
            "--quickstart",
            help="Instead write the files of the quickstart to this folder: its config, the demo model, "
            "example sites, and constraints.txt.",
        ),
    ] = False,
) -> None:
    """Write a commented pipeline file.

    Its budgets suit the demo model and models of published sizes; for the latter a site file is shown, too.
    The demo model is copied to this folder if it is not there.

    With --data also check the first rows of the folder, name their format, and write an InternVL meta file if
    they need one.
    """
    if quickstart:
        if data is not None or model != DEMO_MODEL or out != Path("pipeline.yaml"):
            raise UserError("--quickstart writes files of its own; leave out FILE, --data and --model")
        _write_all(starter_files("models", "configs", "sites", "constraints.txt"))
        terminal().line(f"next: vico run {QUICKSTART}")
        return
    _check_names({"FILE": out, "--data": data, "--model": model})
    new_files = starter_files(DEMO_MODEL) if model == DEMO_MODEL and not Path(model).exists() else []
    text, others = _pipeline_file(out, data, model)
    _write_all([*new_files, *others, NewFile(out, text.encode())])
    terminal().line(f"next: vico data check {out}")


def _check_names(names: Mapping[str, Path | str | None]) -> None:
    """Raise UserError for names that the pipeline file, which is UTF-8 text, cannot hold in one line."""
    faults = Faults()
    for field, name in names.items():
        if not str(name).strip():
            faults.note(f"{field} is empty; give a name, or leave it out")
        elif _NOT_IN_YAML.search(str(name)):
            faults.note(f"{field} {printable(name)} has characters that YAML cannot hold; give another name")
    faults.raise_all()


@dataclass(frozen=True)
class NewFile:
    """A file to write, or to leave as it is if it has this content already."""

    path: Path
    content: bytes

    def is_there(self) -> bool:
        """Return whether the file has this content. Raises UserError if it has another, or is a folder."""
        if not self.path.exists():
            return False
        if self.path.is_file() and self.path.read_bytes() == self.content:
            return True
        raise UserError(f"{self.path} exists and has other content; move it away or give another name")


def starter_files(*names: str) -> list[NewFile]:
    """Return files and folders that the project brings along, for the same paths in the working folder."""
    from cluster.project import STARTER_FOLDER

    files = []
    for name in names:
        source = STARTER_FOLDER / name
        paths = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
        for path in paths:
            if _ABLATIONS in path.parts:
                continue
            files.append(NewFile(path.relative_to(STARTER_FOLDER), path.read_bytes()))
    return files


def _write_all(files: list[NewFile]) -> None:
    """Write the missing files, or nothing if one exists with other content; show what was done."""
    missing = [file for file in files if not file.is_there()]
    for file in files:
        if file not in missing:
            terminal().line(f"{file.path} is already there, with the same content")
            continue
        try:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            file.path.write_bytes(file.content)
        except OSError as error:
            raise UserError(f"{file.path} is not writable ({error.strerror}); give another path") from error
        terminal().line(f"wrote {file.path}")


def _pipeline_file(out: Path, data: Path | None, model: str) -> tuple[str, list[NewFile]]:
    """Return the text of the pipeline file, and the meta file that its records need, if any."""
    from cluster.project import STARTER_FOLDER
    from pipeline.commands.model_advice import model_advice
    from pipeline.commands.project_template import DEMO_TRAINING, pipeline_text, training_blocks
    from stages.shard.config import ShardConfig
    from vico.model_files import weight_files
    from vico.settings import load_settings

    blocks = DEMO_TRAINING
    if model != DEMO_MODEL:
        advice = model_advice(model)
        terminal().wrapped(advice.headline)
        for line in advice.site():
            terminal().line(f"  {line}")
        blocks = training_blocks(advice.budget())
    records: Records = {"format": "demo", "num_samples": 1600}
    max_tiles, files = ShardConfig().max_tiles, list[NewFile]()
    here = STARTER_FOLDER / model if model == DEMO_MODEL and not Path(model).exists() else Path(model)
    if data is not None:
        folder = _model_of_rows(model if here == Path(model) else str(here))
        max_tiles = min(max_tiles, load_settings(folder).max_tiles)
        records, files = _records_of_folder(data, ShardConfig(max_tiles=max_tiles), folder)
    elif here.is_dir() and weight_files(here):
        max_tiles = min(max_tiles, load_settings(here).max_tiles)
    return pipeline_text(str(out), records, model, max_tiles, blocks), files


def _model_of_rows(model: str) -> Path:
    """Return the folder of the model whose tokenizer and tiles the checks of rows need."""
    from vico.checkpoints.hub import model_folder
    from vico.model_files import check_model_folder

    folder = model_folder(model)
    if not folder.is_dir():
        raise UserError(
            f"--model {model} is not a folder; the rows are checked for it, so give the folder or Hub id of "
            "an InternVL checkpoint"
        )
    return check_model_folder(folder, "--model")


def _records_of_folder(data: Path, config: "ShardConfig", model: Path) -> "tuple[Records, list[NewFile]]":
    """Show the format of the folder's rows and the result of their checks; return `inputs.records` for them.

    For InternVL rows also return the meta file.
    """
    from data_prep.records.meta_files import meta_of_files, meta_text
    from pipeline.commands.project_template import META_NAME
    from stages.shard.first_rows import checked_folder

    checked = checked_folder(data, config, model)
    for file in checked.files:
        for line in _checked_lines(file):
            terminal().wrapped(line)
    for path in checked.unused:
        terminal().line(f"{path.name}: not used; to read it, too, add a source to inputs.records")
    if checked.format != "internvl":
        return checked.records, []
    meta = data / META_NAME
    text = meta_text(meta_of_files(data, {file.path: file.root for file in checked.files}))
    if meta.exists() and not (meta.is_file() and meta.read_bytes() == text.encode()):
        raise UserError(
            f"{meta} exists and has other content; move it away, or use it: `vico init` without --data, then "
            f"inputs.records: {{format: internvl, path: {meta}}}"
        )
    return {"format": "internvl", "path": str(meta)}, [NewFile(meta, text.encode())]


def _checked_lines(file: "CheckedFile") -> list[str]:
    """Return a line about a file's first rows, and one for the first row of each reason."""
    from data_prep.records.rejection import shown_line

    reasons = Counter(row["reason"] for row in file.faults)
    counts = {"good": file.num_good, **dict(reasons.most_common())}
    text = ", ".join(f"{count} {result}" for result, count in counts.items() if count) or "none"
    pictures = f", pictures in {file.root}" if file.format != "webdataset" else ""
    first_rows = {row["reason"]: row for row in reversed(file.faults)}
    return [
        f"{file.path.name}: format {file.format}{pictures}; first rows: {text}",
        *(
            f"  line {shown_line(row)}, {reason}: {one_line(row['message'], max_chars=None)}"
            for reason, row in sorted(first_rows.items(), key=lambda item: item[1]["line"])
        ),
    ]
