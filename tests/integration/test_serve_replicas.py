"""`vico serve --replicas`: the built-in answers from two processes of Ray Serve, one of which is killed."""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.site import Site
from pipeline.serving.server import serve
from pipeline.serving.start.settings import ReplicaOptions, ServerSettings
from tests.integration.test_serve import LIMITS, SMALL, expected_answer
from tests.integration.test_serve_decoding import demo_questions, message
from tests.integration.test_serve_vllm import PYTHON, needs_vllm
from tests.served import Served, command_of, get
from tests.waiting import PATIENCE_S, has_ended, wait_until
from vico.errors import UserError

pytestmark = pytest.mark.slow
"""A replica imports torch when it starts; other work may take the CPUs."""


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="v-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        site = Path(folder) / "site.yaml"  # a short path: Ray's sockets allow no long one
        site.write_text(f"ray: {{temp_dir: {folder}, num_cpus: 2}}\n")
        server = Served(SMALL, "--replicas", "2", "--site", str(site), "--max-batch", "4").started()
        yield server
        code, errors = server.end()
        assert code == 0, errors
        assert "1 of 2 replicas run" in errors and "all 2 replicas run again" in errors, "of the killed one"
        assert not list(Path(folder).glob("vico-ray-*")), "its Ray has ended"


def replicas_of(server: Served) -> list[psutil.Process]:
    processes = psutil.Process(server.process.pid).children(recursive=True)
    return [process for process in processes if "ServeReplica" in command_of(process)]


def health(server: Served) -> dict[str, Any]:
    return get(f"{server.url[:-3]}/health")[1]


def test_replicas_give_the_built_in_answers(server):
    assert len(replicas_of(server)) == 2 and health(server)["replicas"] == 2
    questions = demo_questions(12)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda q: server.ask([message(*q)], max_tokens=20), questions))
    for (turns, images), answer in zip(questions, answers, strict=True):
        expected = expected_answer(SMALL, turns, images, 20, False)
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.prompt_tokens == expected.num_prompt
    events = list(server.ask([message(*questions[0])], max_tokens=20, stream=True))
    assert (
        "".join(event.choices[0].delta.content or "" for event in events)
        == answers[0].choices[0].message.content
    )
    assert len(events) > 3, "it arrives in pieces"


def test_a_killed_replica_loses_no_answer_and_is_replaced(server):
    """Clients do not try again by themselves here; the killed replica's jobs go to the other one."""
    [question] = demo_questions(1)
    expected = server.ask([message(*question)], max_tokens=20).choices[0].message.content
    before = {process.pid for process in replicas_of(server)}
    killed = threading.Event()

    def ask(number: int) -> str | None:
        if number == 24:
            os.kill(min(before), signal.SIGKILL)
            killed.set()
        return server.ask([message(*question)], max_tokens=20).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(72))) == {expected}
    assert killed.is_set()
    wait_until(lambda: health(server)["replicas"] == 2 and len(replicas_of(server)) == 2)
    after = {process.pid for process in replicas_of(server)}
    assert min(before) not in after and max(before) in after
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(16))) == {expected}
    wait_until(lambda: health(server)["requests"] == 0)


def test_a_client_that_leaves_frees_its_replica(server):
    """All rows of both replicas are taken by long answers; when their clients leave, others are answered."""
    [question] = demo_questions(1)
    options = {"max_tokens": 1000, "temperature": 2, "stream": True}
    streams = [server.ask([message(*question)], seed=number, **options) for number in range(8)]
    for stream in streams:
        next(iter(stream))
        stream.close()
    wait_until(lambda: health(server)["requests"] == 0)
    for replica in replicas_of(server):
        wait_until(lambda replica=replica: replica.cpu_percent(1) < 50)
    assert server.ask([message(*question)], max_tokens=2).usage.completion_tokens == 2


def test_a_replica_that_cannot_start_ends_the_server_with_its_reason(tmp_path):
    """Here no replica has a vLLM; it is the same with a model or CUDA that some node lacks."""
    with tempfile.TemporaryDirectory(prefix="v-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        site = Path(folder) / "site.yaml"
        site.write_text(f"ray: {{temp_dir: {folder}, num_cpus: 2}}\n")
        options = [
            "--replicas",
            "2",
            "--site",
            str(site),
            "--engine",
            "vllm",
            "--engine-python",
            "/bin/false",
        ]
        server = Served(SMALL, *options, "--engine-folder", str(tmp_path / "language"))
        output, errors = server.process.communicate(timeout=PATIENCE_S)
    assert (server.process.returncode, output) == (2, "")
    [line] = errors.splitlines()
    assert line.startswith("error: --replicas=2: they do not start: host "), errors
    assert "--engine vllm: vLLM ended at its start" in line


@needs_vllm
def test_a_replica_has_a_vllm_of_its_own(tmp_path):
    """It comes back after it was killed, it ends with its replica, and the next replica has one again."""
    questions = [message(*question) for question in demo_questions(4)]

    def answers(server: Served) -> list[str | None]:
        return [server.ask([question], max_tokens=20).choices[0].message.content for question in questions]

    def vllm_of(server: Served) -> list[psutil.Process]:
        [replica] = replicas_of(server)
        return [process for process in replica.children() if "vllm.entrypoints" in command_of(process)]

    with tempfile.TemporaryDirectory(prefix="v-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        site = Path(folder) / "site.yaml"
        site.write_text(f"ray: {{temp_dir: {folder}, num_cpus: 2}}\n")
        options = ["--replicas", "1", "--site", str(site), "--max-total-tokens", "2048", "--engine", "vllm"]
        options += ["--engine-python", str(PYTHON), "--engine-arg=--enforce-eager"]
        server = Served(SMALL, *options, "--engine-folder", str(tmp_path / "language")).started()
        server.client = server.client.with_options(timeout=PATIENCE_S)
        expected = [
            expected_answer(SMALL, *question, 20, False).text for question in demo_questions(len(questions))
        ]
        assert answers(server) == expected
        [first] = vllm_of(server)
        first.kill()
        assert answers(server) == expected
        [second] = vllm_of(server)
        [replica] = replicas_of(server)
        replica.kill()
        assert answers(server) == expected
        wait_until(lambda: has_ended(second))
        [third] = vllm_of(server)
        assert len({first.pid, second.pid, third.pid}) == 3
        assert server.end()[0] == 0
        wait_until(lambda: has_ended(third))


def test_a_signal_while_replicas_start_ends_all(tmp_path):
    with tempfile.TemporaryDirectory(prefix="v-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        site = Path(folder) / "site.yaml"
        site.write_text(f"ray: {{temp_dir: {folder}, num_cpus: 2}}\n")
        server = Served(SMALL, "--replicas", "2", "--site", str(site))
        main = psutil.Process(server.process.pid)

        def is_starting() -> bool:
            assert not has_ended(main), server.process.stderr.read()
            return any("Serve" in command_of(child) for child in main.children(recursive=True))

        wait_until(is_starting)
        children = main.children(recursive=True)
        code, errors = server.end()
        assert (code, errors) == (128 + signal.SIGTERM, "")
        wait_until(lambda: all(map(has_ended, children)))
        assert not list(Path(folder).glob("vico-ray-*"))


def test_replicas_that_do_not_fit_are_an_error_of_one_line():
    with tempfile.TemporaryDirectory(prefix="v-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        site = Site.model_validate({"ray": {"num_cpus": 2, "temp_dir": folder}})
        settings = ServerSettings("127.0.0.1", 0, "cpu", "float32", replicas=ReplicaOptions(3, site))
        with pytest.raises(UserError, match="--replicas=3 need 3 CPU, Ray has 2; give fewer replicas"):
            serve(str(SMALL), settings, LIMITS)
