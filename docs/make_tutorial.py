"""The tutorial docs/own-data.md: run its commands, and write what they print into the page.

Blocks of the page:

    ```console      commands after `$`, each with its output
    ```yaml NAME    the file NAME: one that a command above wrote, or one that the reader writes
    ```bash         commands that are not run here

    python docs/make_tutorial.py            run everything in a new folder and write the page
    python docs/make_tutorial.py --check    run everything and say what differs; write nothing
"""

import argparse
import difflib
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "own-data.md"
PICTURE = ROOT / "docs" / "images" / "own_data_tiles.png"
"""What `vico route --out tiles.png` of the page drew."""
COLUMNS = 100
_BLOCK = re.compile(
    r"^```(?P<kind>console|bash|yaml \S+|python \S+)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")
_WITH_BARS = ("vico run", "vico serve")
"""Commands whose progress bars a terminal would show; their output goes through a pipe, without the bars."""
_LEFT_OUT = re.compile(r"[a-z]+: [\d,]+/[\d,]+ |note: .* tracked files differed from commit ")
"""Lines on how far a stage is, as many as the machine is slow, and on uncommitted changes of the checkout."""
_BLANK_TILES = re.compile(r"router: the threshold keeps \d+ of ")
"""A line of which another machine's rounding decides whether there is one."""
_VARIES = {
    r"(\d+ h )?(\d+ min )?\d+(\.\d+)? m?s\b": "TIME",
    r"\d{8}-\d{6}-\w{4}": "RUN",
    r"\b[0-9a-f]{12}\b": "FINGERPRINT",
    r"/\S*/(?=my-data|runs)": "",
}
"""What differs from run to run, or with a stage's CODE_VERSION, and its name in a comparison."""
_NUMBER = re.compile(r"\d[\d.,]*")


def files(text: str) -> dict[str, str]:
    """Return name -> content of the files that the page shows."""
    blocks = ((block["kind"].split(), block["body"]) for block in _BLOCK.finditer(text))
    return {kind[1]: body for kind, body in blocks if len(kind) == 2}


def run_page(text: str, folder: Path) -> str:
    """Run the page's commands in a folder that has the checkout's `examples` and `models`.

    Return the page with their output and with the files that they wrote.

    Raises SystemExit if a command fails.
    """

    def block(match: re.Match[str]) -> str:
        kind, body = match["kind"], match["body"]
        if kind == "console":
            body = "".join(_with_output(line, folder) for line in body.splitlines() if line.startswith("$ "))
        elif kind != "bash":
            file = folder / kind.split()[1]
            if file.exists():
                body = file.read_text(encoding="utf-8")
            else:
                file.write_text(body, encoding="utf-8")
        return f"```{kind}\n{body}```"

    for name in ("examples", "models"):
        (folder / name).symlink_to(ROOT / name)
    return _BLOCK.sub(block, text)


def _with_output(line: str, folder: Path) -> str:
    command = line.removeprefix("$ ")
    print(line, flush=True)
    code, output = _printed(command, folder)
    if code:
        raise SystemExit(f"{command} ended with exit code {code}:\n{output}")
    shown = _ESCAPES.sub("", output).replace(f"{folder}/", "")
    lines = [text.rstrip() for text in shown.splitlines() if not _LEFT_OUT.match(text)]
    return "\n".join([line, *lines]) + "\n"


def _printed(command: str, folder: Path) -> tuple[int, str]:
    """Return the exit code of a command and what it writes to a terminal of COLUMNS columns."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(COLUMNS), "TERM": "dumb"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    words = ["bash", "-c", command]
    if command.startswith(_WITH_BARS):
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr
    ours, theirs = pty.openpty()
    process = subprocess.Popen(words, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    printed = bytearray()
    try:
        while part := os.read(ours, 65536):
            printed += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return process.wait(), printed.decode()


def comparable(text: str) -> list[str]:
    """Return the page's words without what differs from run to run and from machine to machine.

    That is run ids, fingerprints, paths of this machine and where they wrap a line, and, from the first
    `vico run` on, every number, the width of columns, and advice about blank tiles.
    """
    for pattern, name in _VARIES.items():
        text = re.sub(pattern, name, text)
    before, command, after = text.partition("$ vico run ")
    lines = [line for line in (command + after).splitlines() if not _BLANK_TILES.match(line)]
    after = "\n".join(re.sub("[─━]+", " ", _NUMBER.sub("N", line)) for line in lines)
    return [*before.split(), *after.split()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say what differs; write nothing")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        written = run_page(text, Path(folder))
        if not options.check:
            shutil.copyfile(Path(folder) / "tiles.png", PICTURE)
            PAGE.write_text(written, encoding="utf-8")
            return 0
    changes = list(difflib.unified_diff(comparable(text), comparable(written), "page", "run", lineterm=""))
    print("\n".join(changes))
    return 1 if changes else 0


if __name__ == "__main__":
    sys.exit(main())
