"""Nothing but `pipeline/terminal/` writes to the terminal."""

import ast
from pathlib import Path

import pytest

from tests.import_graph import modules

ROOT = Path(__file__).parents[4]
OWN = "pipeline/terminal/"
CALLS = (
    "print",
    "pprint.pprint",
    "typer.echo",
    "typer.secho",
    "click.echo",
    "click.secho",
    "os.write",
    "logging.StreamHandler",
    "logging.basicConfig",
    "traceback.print_exc",
    "traceback.print_exception",
    "warnings.showwarning",
)
STREAMS = ("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__")
HANDED_TO = ("print_json", "Terminal", "Display", "LiveView")
# (file, source) that may: what they write is not from data, and why
ALLOWED = {
    ("pipeline/one_place.py", "sys.stderr"): "before the first import of our packages",
    ("cluster/ray_start/local.py", "sys.stderr"): "the process ends at once; the stream is a PlainStream",
    ("cluster/launchers/driver_process.py", "sys.stderr"): "lines of its own in the output of a job",
    ("stages/evaluate/table.py", "print"): "a program of its own that prints Markdown",
    ("data_prep/demo/mix.py", "print"): "a program of its own that prints numbers of the demo",
}


def writers(root: Path) -> list[tuple[str, int, str]]:
    """Return (file, line, source) of each call that writes to the terminal, and each use of its streams.

    To hand a standard stream to a function of `pipeline/terminal/` is no such use.
    """
    lines = []
    for path in modules(root).values():
        file = path.relative_to(root).as_posix()
        if file.startswith(OWN):
            continue
        tree = ast.parse(path.read_text())
        handed = {
            id(argument)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in HANDED_TO
            for argument in node.args
        }
        for node in ast.walk(tree):
            source = ""
            if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
                source = ast.unparse(node.func)
            elif isinstance(node, ast.Call) and _is_exit_with_text(node):
                source = "sys.exit"
            elif isinstance(node, ast.Attribute) and ast.unparse(node) in STREAMS and id(node) not in handed:
                source = ast.unparse(node)
            elif isinstance(node, ast.ImportFrom) and node.module in ("typer", "click", "sys", "pprint"):
                source = next((name for name in _from_imports(node) if name in (*CALLS, *STREAMS)), "")
            if source:
                lines.append((file, node.lineno, source))
    return lines


def _is_exit_with_text(call: ast.Call) -> bool:
    """Return whether `sys.exit` gets a text, which it would write to standard error."""
    is_exit = ast.unparse(call.func) in ("sys.exit", "exit", "SystemExit")
    return is_exit and any(
        isinstance(argument, ast.JoinedStr | ast.Constant)
        and not (isinstance(argument, ast.Constant) and isinstance(argument.value, int))
        for argument in call.args
    )


def _from_imports(node: ast.ImportFrom) -> list[str]:
    return [f"{node.module}.{alias.name}" for alias in node.names]


def test_no_other_module_writes_to_the_terminal():
    # `answer_stream` decides which stream a command writes to; it writes nothing.
    others = [
        (file, line, source)
        for file, line, source in writers(ROOT)
        if (file, source) not in ALLOWED and file != "pipeline/commands/options.py"
    ]
    assert others == []
    files = {file for file, _ in ALLOWED}
    assert files <= {file for file, _, _ in writers(ROOT)}, "a permission that nobody needs"


@pytest.mark.parametrize(
    "source",
    [
        "print(1)",
        "import typer\ntyper.echo('x')",
        "from typer import echo",
        "import sys\nsys.stderr.write('x')",
        "import sys\nout = sys.stdout",
        "import sys\nsys.exit(f'error: {1}')",
        "import logging, sys\nlogging.StreamHandler()",
        "import os\nos.write(2, b'x')",
    ],
)
def test_a_new_writer_is_found(tmp_path, source):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "new.py").write_text(source)
    assert len(writers(tmp_path)) == 1
