"""Hub ids: fetched from a server with the Hub's protocol, then from the cache; errors are one line."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import make_tiny_model
from vico.checkpoints.hub import model_folder

COMMIT, NEXT = "0123456789abcdef0123456789abcdef01234567", "f" * 40
# What the caller sees: the class of the model; or the folder, or the line of a UserError raised without
# torch.
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


class ModelHub(ThreadingHTTPServer):
    """Serves one model folder as `someone/tiny`, in two commits; `main` may be changed."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.main = folder, COMMIT
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
            for path in sorted(self.folder.iterdir())
        ]


class Handler(BaseHTTPRequestHandler):
    server: ModelHub

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        start, _, file = self.path.partition("/resolve/")
        commit, _, name = file.partition("/")
        path = self.server.folder / name
        if start == "/someone/tiny" and commit in (COMMIT, NEXT) and path.is_file():
            content = path.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        elif self.path.startswith("/api/models/someone/tiny/tree"):
            self.reply(200, json.dumps(self.server.files()).encode())
        elif self.path.startswith("/api/models/someone/tiny"):
            self.reply_with_info()
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def reply_with_info(self) -> None:
        revision = self.path.partition("/revision/")[2].partition("?")[0] or "main"
        commit = self.server.main if revision == "main" else revision
        if commit not in (COMMIT, NEXT):
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": file["path"]} for file in self.server.files()]
        info = {"id": "someone/tiny", "modelId": "someone/tiny", "sha": commit, "siblings": siblings}
        return self.reply(200, json.dumps(info).encode())

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("hub") / "m")
    (folder / "weights.bin").write_bytes(b"never requested")
    with ModelHub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def printed(code: str, name: str, endpoint: str, cache: Path, **environment: str) -> str:
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment}
    child = subprocess.run(
        [sys.executable, "-c", code, name],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[4],
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def test_an_id_is_fetched_once_and_then_opens_offline(hub, tmp_path):
    address, requests = hub.address, hub.requests
    assert printed(OPEN, "someone/tiny", address, tmp_path) == "VicoModel"
    assert any(path.endswith("/model.safetensors") for path in requests)
    assert not any(path.endswith("weights.bin") for path in requests)
    requests.clear()
    assert printed(OPEN, "someone/tiny", address, tmp_path, HF_HUB_OFFLINE="1") == "VicoModel"
    assert not requests


def test_a_pipeline_may_name_its_model_by_id(hub, tmp_path):
    """Its folder is the snapshot of one commit; the files are digested like those of any folder."""
    (tmp_path / "pipeline.yaml").write_text(
        "inputs: {records: {format: demo, num_samples: 4}, model: someone/tiny}\n"
    )
    config = str(tmp_path / "pipeline.yaml")
    lines = [printed(CONFIG, config, hub.address, tmp_path / "cache") for _ in range(2)]
    assert [line.split()[0] for line in lines] == [f"someone/tiny@{COMMIT}"] * 2
    folder = Path(lines[0].split()[1])
    assert folder.name == COMMIT and (folder / "model.safetensors").exists()
    (tmp_path / "pipeline.yaml").write_text(
        "inputs: {records: {format: demo, num_samples: 4}, model: models/mistyped}\n"
    )
    hub.requests.clear()
    mistyped = str(Path("models/mistyped").absolute())
    assert printed(CONFIG, config, hub.address, tmp_path / "cache").split() == [mistyped, mistyped]
    assert not hub.requests, "models/ is a local folder, so this is a path and the Hub is not asked"


def test_route_takes_an_id_and_asks_no_hub_for_a_path(hub, tmp_path):
    route = (
        "import sys; from pipeline.cli import main\n"
        "sys.argv = ['vico', 'route', sys.argv[1], 'none.png']\n"
        "sys.stderr = sys.stdout\n"
        "try: main()\nexcept SystemExit: pass"
    )
    # The model was fetched: what is missing is its router's threshold.
    fetched = printed(route, "someone/tiny", hub.address, tmp_path)
    assert f"{COMMIT}/config.json has no vico.absolute_threshold" in fetched
    hub.requests.clear()
    mistyped = printed(route, "models/mistyped", hub.address, tmp_path)
    assert mistyped.startswith("error: model=models/mistyped is not a folder")
    assert not hub.requests


def test_a_cached_commit_is_kept_when_main_moves(hub, tmp_path):
    """Another commit is another model for every stage; the next command must find the first one."""
    address = hub.address
    assert Path(printed(FIND, "someone/tiny", address, tmp_path)).name == COMMIT
    hub.main = NEXT
    try:
        assert Path(printed(FIND, "someone/tiny", address, tmp_path)).name == COMMIT
        assert Path(printed(FIND, f"someone/tiny@{COMMIT}", address, tmp_path / "node")).name == COMMIT
        assert Path(printed(FIND, "someone/tiny@main", address, tmp_path)).name == NEXT
    finally:
        hub.main = COMMIT
    # A run has the id with its commit: it means the same in a folder that has a subfolder `someone`.
    (tmp_path / "cwd" / "someone").mkdir(parents=True)
    inside = f"import os; os.chdir({str(tmp_path / 'cwd')!r})\n{FIND}"
    assert Path(printed(inside, f"someone/tiny@{COMMIT}", address, tmp_path)).name == COMMIT
    offline = printed(FIND, f"someone/tiny@{COMMIT}", address, tmp_path, HF_HUB_OFFLINE="1")
    assert Path(offline).name == COMMIT


def test_an_unavailable_model_is_one_line_with_the_remedy(hub, tmp_path):
    unknown = printed(FIND, "someone/else", hub.address, tmp_path)
    assert unknown.startswith("error: model=someone/else is neither a local folder nor a model on the Hub")
    revision = printed(FIND, "someone/tiny@v9", hub.address, tmp_path)
    assert revision.startswith("error: model=someone/tiny@v9: the Hub has no such revision")
    offline = printed(FIND, "someone/tiny", hub.address, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.startswith("error: model=someone/tiny is neither a local folder nor in the Hub's cache")
    assert "hf download someone/tiny" in offline and "\n" not in offline


@pytest.mark.parametrize("name", ["models/small-internvl/missing", "/nowhere/model", "single"])
def test_a_path_is_not_mistaken_for_an_id(name):
    assert model_folder(name) == Path(name)
