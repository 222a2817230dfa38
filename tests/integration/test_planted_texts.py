"""Control sequences and markup planted in every field: the real commands show them and obey none.

Each command runs as a process with its output in pipes, and again in a terminal.
"""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import yaml

from tests.integration.tiny_pipeline.project import TinyProject
from tests.record_files import picture, row
from tests.tiny_model import make_tiny_model
from tests.waiting import PATIENCE_S
from vico.checkpoints import load_model
from vico.checkpoints.save import save_model

ROOT = Path(__file__).parents[2]
PLANTED = "[/x][red]\x1b]0;title\x07\x1b[2J\x1b[1A\x9b31m\x7f\u202eleft\u2028\r\nerror: forged"
FILE = PLANTED.replace("/", "")
"""The text as a name of a file."""
OURS = re.compile(r"\x1b\[(\d+(;\d+)*)?[mAK]|\x1b\[\?25[hl]|\r(?=\n|\x1b\[2K)|\x1b\[2K")
"""Colours, and the movements of a progress bar, as rich writes them on a terminal."""
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u200e\u200f]")
TINY = ("-m", "tests.integration.tiny_pipeline.command")
REAL = ("-m", "pipeline.cli")


def in_pipes(command: list[str], cwd: Path) -> tuple[int, str]:
    """Return exit code, and standard output with standard error."""
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, timeout=PATIENCE_S)
    return done.returncode, (done.stdout + done.stderr).decode("utf-8", "surrogateescape")


def in_terminal(command: list[str], cwd: Path) -> tuple[int, str]:
    """Return the same of a command in a terminal, without what rich writes for colours and bars."""
    main, side = pty.openpty()
    process = subprocess.Popen(command, cwd=cwd, env=environment(), stdout=side, stderr=side, stdin=side)
    os.close(side)
    output = b""
    while True:
        try:
            piece = os.read(main, 1 << 16)
        except OSError:  # Linux: the terminal's last writer has ended
            break
        if not piece:
            break
        output += piece
    os.close(main)
    code = process.wait(timeout=PATIENCE_S)
    return code, OURS.sub("", output.decode("utf-8", "surrogateescape"))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "TERM": "xterm-256color"}


def texts_in(value):
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from texts_in(inner)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two runs of the tiny pipeline; the second has the planted text wherever a text can be."""
    project = TinyProject(tmp_path_factory.mktemp("planted"))
    project.vico("run")
    project.vico("run", "--set", "draw.scale=0.2")
    _, (path, content) = sorted(
        ((path, json.loads(path.read_text())) for path in project.storage.glob("runs/*/run.json")),
        key=lambda file: file[1]["created"],
    )
    content |= {"experiment": PLANTED, "error": PLANTED, "site": PLANTED, "site_file": f"/{PLANTED}"}
    content["config"]["inputs"]["records"]["path"] = PLANTED
    content["config"][PLANTED] = PLANTED
    content["stages"]["square"]["reused_from"] = PLANTED
    for attempt in content["attempts"]:
        attempt["host"] = PLANTED
    path.write_text(json.dumps(content))
    with (path.parent / "driver.log").open("a") as log:
        log.write(f"{PLANTED}\n")
    draw = project.storage / "draw" / content["stages"]["draw"]["fingerprint"]
    (draw / "output" / FILE).write_text("not in the record")
    (draw / "attempts" / "1" / f"rank-{FILE}.log").write_text(f"{PLANTED}\n")
    record = json.loads((draw / "record.json").read_text())
    record["git"] = {"commit": PLANTED, "dirty": True, "error": PLANTED}
    record["packages"][PLANTED] = PLANTED
    (draw / "record.json").write_text(json.dumps(record))
    (project.storage / "runs" / FILE).mkdir()
    return project, path.parent.name


@pytest.mark.parametrize("show", [in_pipes, in_terminal])
@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("status", "RUN"),
        ("status", "RUN", "--json"),
        ("logs", "RUN"),
        ("logs", "RUN", "--stage", "draw"),
        ("logs", "RUN", "--stage", PLANTED),
        ("audit", "RUN"),
        ("audit", "RUN", "--json"),
        ("audit", PLANTED),
        ("diff", "OTHER", "RUN"),
        ("diff", "OTHER", "RUN", "--json"),
        ("gc", "--dry-run"),
        ("gc", "--dry-run", "--json"),
        ("reproduce", "RUN", "--out", "FRESH"),
        ("report", "RUN", "--out", "FRESH"),
        ("report", "RUN", "--out", "FRESH", "--json"),
        ("plan", "pipeline.yaml"),
        ("plan", "pipeline.yaml", "--set", f"draw.scale={PLANTED}"),
        ("plan", "planted.yaml"),
        ("plan", f"{FILE}.yaml"),
        ("plan", "pipeline.yaml", f"--{FILE}"),
        (FILE,),
    ],
    ids=lambda arguments: " ".join(arguments).replace(PLANTED, "PLANTED").replace(FILE, "PLANTED"),
)
def test_no_command_on_a_store_obeys_its_texts(store, tmp_path, arguments, show):
    project, run = store
    (project.folder / "planted.yaml").write_text(
        yaml.safe_dump({PLANTED: 1, "experiment": PLANTED, "inputs": {"records": {"format": PLANTED}}})
    )
    others = {path.name for path in project.storage.glob("runs/*") if (path / "run.json").exists()} - {run}
    named = {"RUN": run, "OTHER": others.pop(), "FRESH": str(tmp_path / FILE)}
    options = [] if len(arguments) == 1 and arguments[0] == FILE else ["--site", "site.yaml", "--storage"]
    storage = [project.storage_option] if options else []
    command = [sys.executable, *TINY, *(named.get(word, word) for word in arguments), *options, *storage]
    code, output = show(command, project.folder)
    assert code in (0, 1, 2) and "Traceback" not in output, output
    assert OBEYED.findall(output.replace("\r\n", "\n")) == [], repr(output)
    if arguments[0] != "logs":  # where it is a line of the log
        assert not re.search("^error: forged", output, re.MULTILINE), "a text made a line of its own"
    if "--json" in arguments and show is in_pipes:
        values = list(texts_in(json.loads(output)))
        assert any(PLANTED in value or FILE in value for value in values), "JSON is exact"
    shown = (("status",), ("logs", "RUN"), ("audit", "RUN"), ("gc", "--dry-run"))
    if arguments in shown and show is in_pipes:  # a terminal's narrow columns break it
        text = re.sub(r"\s", "", output)
        assert "\\x1b]0;title\\x07" in text, "it is shown"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows, pictures, sets and tar keys with the planted text, a model and a model with a router."""
    folder = tmp_path_factory.mktemp("texts")
    model = make_tiny_model(folder / "model")
    routed = load_model(model)
    routed.add_compressed_connector(1)
    routed.add_router(2)
    save_model(routed.state_dict(), model, folder / "routed", {"absolute_threshold": 0.5})
    rows = folder / "rows"
    rows.mkdir()
    (rows / f"{FILE}.png").write_bytes(picture(1))
    lines = [row(f"{FILE}.png"), row(PLANTED), {**row(), PLANTED: "a.png"}, {**row(), "video": PLANTED}]
    lines.append({**row(), "id": PLANTED, "conversations": [{"from": PLANTED, "value": "x"}]})
    (rows / f"{FILE}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = {PLANTED: {"root": ".", "annotation": f"{FILE}.jsonl", "repeat_time": 1, "length": len(lines)}}
    (rows / "planted.json").write_text(json.dumps(meta))
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / f"{FILE}.tar", "w") as tar:
        for name, content in ((f"{FILE}.json", json.dumps(row("b.png")).encode()), (f"{FILE}.png", b"no")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    (folder / "pictures").mkdir()
    (folder / "pictures" / f"{FILE}.png").write_bytes(picture(2))
    (folder / "broken").mkdir()
    (folder / "broken" / f"{FILE}.png").write_bytes(b"no picture")
    for name, records in {
        "meta": {"format": "internvl", "path": str(rows / "planted.json")},
        "tars": {"format": "webdataset", "path": str(folder / "tars")},
    }.items():
        content = {"inputs": {"records": records, "model": str(model)}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.mark.parametrize("show", [pytest.param(in_pipes, marks=pytest.mark.slow), in_terminal])
@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "check", "meta.yaml"),
        pytest.param(("data", "check", "tars.yaml"), marks=pytest.mark.slow),
        ("init", f"{FILE}.yaml", "--data", "rows", "--model", "model"),
        ("init", "tars-init.yaml", "--data", "tars", "--model", "model"),
        ("route", "routed", "pictures", "--out", FILE),
        ("route", "routed", "broken"),
        ("route", "routed", f"pictures/{FILE}.png", "--out", f"{FILE}.gif"),
        ("route", PLANTED, "pictures"),
    ],
    ids=lambda arguments: " ".join(arguments).replace(PLANTED, "PLANTED").replace(FILE, "PLANTED"),
)
def test_no_command_on_data_obeys_its_texts(data, tmp_path, arguments, show):
    folder = tmp_path / "copy"
    shutil.copytree(data, folder)
    code, output = show([sys.executable, *REAL, *arguments], folder)
    assert code in (0, 2) and "Traceback" not in output, output
    assert OBEYED.findall(output.replace("\r\n", "\n")) == [], repr(output)
    assert not re.search("^error: forged", output, re.MULTILINE), "a text made a line of its own"
    assert "\\x1b" in output, "it is shown"
