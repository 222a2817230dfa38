"""Hub ids: fetched from a server that speaks the Hub's protocol, from the cache after that, else one line."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_model
from vico.checkpoints.hub import model_folder

COMMIT, NEXT = "0123456789abcdef0123456789abcdef01234567", "f" * 40
# what the caller sees: the class of the model, or the one line of a UserError, which comes before torch
OPEN = """
import sys
from vico.checkpoints import load_model
print(type(load_model(sys.argv[1])).__name__)
"""
FIND = """
import sys
from vico.errors import UserError
from vico.checkpoints.hub import model_folder
try:
    print(model_folder(sys.argv[1]))
except UserError as error:
    print("error:", error)
"""

CONFIG = """
import sys
from pathlib import Path
from pipeline.config.pipeline_file import load_config
from pipeline.config.graph import pipeline_graph
inputs = load_config(Path(sys.argv[1]), pipeline_graph()).inputs
print(inputs.model, inputs.model_folder)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The address of a server that gives out one model, `someone/tiny`, in two commits; what it was asked
    for; which commit is main."""
    folder = make_tiny_model(tmp_path_factory.mktemp("hub") / "m")
    (folder / "weights.bin").write_bytes(b"never asked for")
    asked: list[str] = []
    main = [COMMIT]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            start, _, place = self.path.partition("/resolve/")
            commit, _, name = place.partition("/")
            if start == "/someone/tiny" and commit in (COMMIT, NEXT) and (folder / name).is_file():
                content = (folder / name).read_bytes()
                etag = hashlib.sha256(content).hexdigest()
                return self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
            if self.path.startswith("/api/models/someone/tiny/tree"):
                return self.reply(200, json.dumps(self.files()).encode())
            if self.path.startswith("/api/models/someone/tiny"):
                revision = self.path.partition("/revision/")[2].partition("?")[0] or "main"
                commit = main[0] if revision == "main" else revision
                if commit not in (COMMIT, NEXT):
                    return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                siblings = [{"rfilename": file["path"]} for file in self.files()]
                info = {"id": "someone/tiny", "modelId": "someone/tiny", "sha": commit, "siblings": siblings}
                return self.reply(200, json.dumps(info).encode())
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def files(self) -> list[dict]:
            paths = sorted(folder.iterdir())
            return [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in paths
            ]

        def reply(self, status: int, content: bytes, headers: dict | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked, main
    server.shutdown()
    server.server_close()


def printed(code: str, name: str, endpoint: str, cache: Path, **environment: str) -> str:
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[4],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_id_is_fetched_once_and_opens_offline_after_that(hub, tmp_path):
    address, asked, _ = hub
    assert printed(OPEN, "someone/tiny", address, tmp_path) == "VicoModel"
    assert any(path.endswith("/model.safetensors") for path in asked)
    assert not any(path.endswith("weights.bin") for path in asked)
    asked.clear()
    assert printed(OPEN, "someone/tiny", address, tmp_path, HF_HUB_OFFLINE="1") == "VicoModel"
    assert not asked


def test_a_pipeline_may_name_its_model_by_id(hub, tmp_path):
    """Its folder is the snapshot of one commit, whose files are digested like any others."""
    (tmp_path / "pipeline.yaml").write_text(
        "inputs: {records: {format: demo, num_samples: 4}, model: someone/tiny}\n"
    )
    config = str(tmp_path / "pipeline.yaml")
    asked = [printed(CONFIG, config, hub[0], tmp_path / "cache") for _ in range(2)]
    assert [text.split()[0] for text in asked] == [f"someone/tiny@{COMMIT}"] * 2
    folder = Path(asked[0].split()[1])
    assert folder.name == COMMIT and (folder / "model.safetensors").exists()
    (tmp_path / "pipeline.yaml").write_text(
        "inputs: {records: {format: demo, num_samples: 4}, model: models/mistyped}\n"
    )
    hub[1].clear()
    mistyped = str(Path("models/mistyped").absolute())
    assert printed(CONFIG, config, hub[0], tmp_path / "cache").split() == [mistyped, mistyped]
    assert not hub[1], "models/ is a folder here: a path is meant, and the Hub is not asked"


def test_a_commit_that_was_taken_stays_when_main_moves_on(hub, tmp_path):
    """Another commit is another model to every stage; the next command must find the one it began with."""
    address, _, main = hub
    assert Path(printed(FIND, "someone/tiny", address, tmp_path)).name == COMMIT
    main[0] = NEXT
    try:
        assert Path(printed(FIND, "someone/tiny", address, tmp_path)).name == COMMIT
        assert Path(printed(FIND, f"someone/tiny@{COMMIT}", address, tmp_path / "node")).name == COMMIT
        assert Path(printed(FIND, "someone/tiny@main", address, tmp_path)).name == NEXT
    finally:
        main[0] = COMMIT
    offline = printed(FIND, f"someone/tiny@{COMMIT}", address, tmp_path, HF_HUB_OFFLINE="1")
    assert Path(offline).name == COMMIT


def test_what_cannot_be_had_is_one_line_with_the_remedy(hub, tmp_path):
    unknown = printed(FIND, "someone/else", hub[0], tmp_path)
    assert unknown.startswith("error: model=someone/else is neither a folder here nor a model")
    revision = printed(FIND, "someone/tiny@v9", hub[0], tmp_path)
    assert revision.startswith("error: model=someone/tiny@v9: the Hub has no such revision")
    offline = printed(FIND, "someone/tiny", hub[0], tmp_path, HF_HUB_OFFLINE="1")
    assert offline.startswith("error: model=someone/tiny is no folder here and not in the Hub's cache")
    assert "hf download someone/tiny" in offline and "\n" not in offline


@pytest.mark.parametrize("name", ["models/small-internvl/missing", "/nowhere/model", "single"])
def test_a_path_is_not_taken_for_an_id(name):
    assert model_folder(name) == Path(name)
