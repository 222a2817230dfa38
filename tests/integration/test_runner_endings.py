"""How a command on a run ends: retries by kind of failure, and hooks."""

import http.server
import json
import signal
import sys
import threading

import pytest

from tests.integration.tiny_pipeline.project import TinyProject
from tests.waiting import PATIENCE_S

WRITE_STATE = (
    "import os, sys; open(os.environ['VICO_STATE'], 'w').write(sys.stdin.read() + os.environ['VICO_RUN'])"
)


@pytest.fixture
def project(tmp_path):
    project = TinyProject(tmp_path / "project")
    yield project
    project.close()


def site(project, **settings):
    content = {"name": "tiny", "tracking": {"enabled": False}, **settings}
    (project.folder / "site.yaml").write_text(json.dumps(content))


@pytest.mark.parametrize("kind, error", [("io", {"TINY_ERROR": "EIO"}), ("error", {})])
def test_a_failure_of_an_allowed_kind_is_retried_from_the_last_part(project, kind, error):
    site(project, retries={kind: 1, "pause_s": 0.1})
    project.vico("run", TINY_FAIL="square:2", TINY_ONCE=str(project.folder / "once"), **error)
    assert f"tried again in 0.1 s (retries.{kind}: 0 more)" in project.errors + project.last_output
    status = project.status()
    assert status["state"] == "done" and len(status["attempts"]) == 1
    assert [entry["attempt"] for entry in status["stages"]] == [1, 2, 1]
    attempts = project.stage("square") / "attempts"
    assert (attempts / "2" / "metrics.jsonl").read_text().count("\n") == 2, (
        "parts 0 and 1 were not made again"
    )


@pytest.mark.parametrize(
    "allowed, error, words",
    [
        ("io", {}, "square failed: RuntimeError"),
        ("error", {"TINY_ERROR": "EIO"}, "square failed: OSError"),
        ("io", {"TINY_ERROR": "ENOSPC"}, "no space left"),
    ],
)
def test_a_failure_of_another_kind_ends_the_run(project, allowed, error, words):
    site(project, retries={allowed: 3, "pause_s": 0.1})
    code = 2 if "ENOSPC" in error.values() else 1
    project.vico("run", code=code, TINY_FAIL="square:2", TINY_ONCE=str(project.folder / "once"), **error)
    assert words in project.errors
    assert project.status()["stages"][1]["attempt"] == 1


def test_the_run_fails_when_the_retries_are_used_up(project):
    site(project, retries={"error": 2, "pause_s": 0})
    project.vico("run", code=1, TINY_FAIL="square:2")
    assert project.status()["stages"][1]["attempt"] == 3


@pytest.fixture
def listener():
    """Return a URL and the list of bodies posted to it; a POST to /broken is answered with 500."""
    posted = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if self.path == "/broken" else 204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", posted
    server.shutdown()


def test_command_and_url_of_the_hook_get_every_ending(project, listener):
    url, posted = listener
    site(project, hook={"command": [sys.executable, "-c", WRITE_STATE], "url": f"{url}/key-of-the-channel"})
    project.vico("run", code=1, TINY_FAIL="square:1")
    process, _ = project.pause("square:1")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE_S) == 143
    project.vico("run")
    project.vico("run")
    (run,) = project.runs()
    assert [ending["state"] for ending in posted] == ["failed", "interrupted", "done"], (
        "no call if every stage is reused"
    )
    assert {ending["run"] for ending in posted} == {run}
    assert "square failed" in posted[0]["message"] and posted[0]["exit_code"] == 1
    assert posted[2]["storage"] == str(project.storage)
    for ending in posted:
        assert (project.folder / ending["state"]).read_text() == json.dumps(ending) + run


@pytest.mark.parametrize(
    "hook, words",
    [
        ({"command": ["/no/such/program"]}, "hook.command=/no/such/program: No such file"),
        ({"command": [sys.executable, "-c", "raise SystemExit('not today')"]}, "ended with 1: not today"),
        ({"command": ["sleep", "60"], "timeout_s": 0.2}, "did not end within 0.2 s"),
        ({"url": "http://127.0.0.1:9/secret-path"}, "hook.url at 127.0.0.1:9"),
        ({"url": "LISTENER/broken"}, "answered 500"),
    ],
)
def test_a_hook_that_fails_is_reported_and_does_not_fail_the_run(project, listener, hook, words):
    hook = {
        name: value.replace("LISTENER", listener[0]) if name == "url" else value
        for name, value in hook.items()
    }
    site(project, hook=hook)
    project.vico("run", "--until", "draw")
    printed = project.errors + project.last_output
    assert words in printed and "secret-path" not in printed
    assert project.status()["state"] == "done"


def test_a_job_with_a_password_in_a_url_is_refused(project):
    site(project, tracking={"uri": "http://me:secret@mlflow"}, jobs={"address": "http://ray:8265"})
    project.vico("submit", "pipeline.yaml", "--print", code=2)
    assert "tracking.uri (site tiny) holds a password" in project.errors
    assert "me:" not in project.errors + project.last_output
    assert "secret@" not in project.errors + project.last_output
