"""`vico serve --engine vllm`: the built-in engine's answers, many at once, and a vLLM that is killed.

vLLM has its own environment; the variable VICO_VLLM_PYTHON names its Python (docs/serving.md).
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch

from pipeline.serving.vllm.process import engine_arguments
from tests.integration.test_serve import SMALL, eventually, expected_answer
from tests.integration.test_serve_decoding import demo_questions, message
from tests.served import Served, get
from vico.checkpoints import load_model
from vico.checkpoints.language_model import language_model_folder
from vico.errors import UserError

PYTHON = os.environ.get("VICO_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(PYTHON is None, reason="VICO_VLLM_PYTHON names no environment with vLLM")
NUM_QUESTIONS = int(os.environ.get("VICO_VLLM_QUESTIONS", "64"))


def test_the_language_model_is_written_once_in_plain_layout(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = language_model_folder(SMALL, tmp_path / "language")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ours = load_model(SMALL)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        expected = ours.base(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert (folder / "tokenizer.json").stat().st_ino == (SMALL / "tokenizer.json").stat().st_ino or (
        os.stat(tmp_path).st_dev != os.stat(SMALL).st_dev
    )
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert language_model_folder(SMALL, folder) == folder and weights.stat().st_mtime_ns == written
    (folder / "vico_source.json").write_text("{}")  # of another state of the model
    language_model_folder(SMALL, folder)
    assert weights.stat().st_mtime_ns > written
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="was not written by vico"):
        language_model_folder(SMALL, tmp_path / "mine")


def test_a_vllm_that_does_not_start_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match="--engine-arg=x"):
        engine_arguments(["x"])
    options = ["--engine", "vllm", "--engine-folder", str(tmp_path / "language"), "--engine-python"]
    for python, words in (
        ("/nothing", "--engine-python=/nothing"),
        ("/bin/false", "vLLM ended at its start"),
    ):
        server = Served(SMALL, *options, python)
        _, errors = server.process.communicate(timeout=120)
        assert server.process.returncode == 2 and words in errors
        assert errors.startswith("error: ") and errors.count("\n") == 1


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    options = ["--engine", "vllm", "--engine-python", str(PYTHON)]
    options += ["--engine-folder", str(folder / "language")]
    options += ["--engine-arg=--enforce-eager", "--max-requests", "128", "--max-total-tokens", "2048"]
    server = Served(SMALL, *options).started()
    yield server
    code, _ = server.end()
    assert code == 0


@needs_vllm
@pytest.mark.slow
def test_vllm_gives_the_built_in_answers(server):
    questions = demo_questions(NUM_QUESTIONS)
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda q: server.ask([message(*q)], max_tokens=40), questions))
    for (turns, images), answer in zip(questions, answers, strict=True):
        expected = expected_answer(SMALL, turns, images, 40, False)
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.prompt_tokens == expected.num_prompt
        assert answer.usage.prompt_tokens_details.image_tokens == expected.num_visual


@needs_vllm
@pytest.mark.slow
def test_options_of_a_request_reach_vllm(server):
    [question] = demo_questions(1)
    whole = server.ask([message(*question)], max_tokens=40, logprobs=True, top_logprobs=2)
    entries = whole.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == whole.choices[0].message.content
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in entries)
    text = whole.choices[0].message.content
    cut = server.ask([message(*question)], max_tokens=40, stop=text[1])
    assert cut.choices[0].message.content == text[:1]
    options = {"max_tokens": 20, "temperature": 1.5, "seed": 4}
    drawn = {server.ask([message(*question)], **options).choices[0].message.content for _ in range(2)}
    assert len(drawn) == 1
    assert server.ask([message(*question)], max_tokens=2).choices[0].finish_reason in ("length", "stop")


@needs_vllm
@pytest.mark.slow
def test_a_killed_vllm_is_reported_and_starts_again(server):
    [question] = demo_questions(1)
    expected = server.ask([message(*question)], max_tokens=20).choices[0].message.content
    children = f"/proc/{server.process.pid}/task/{server.process.pid}/children"
    pids = Path(children).read_text().split()
    [vllm] = [int(pid) for pid in pids if b"vllm" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(vllm, signal.SIGKILL)
    health = f"{server.url[:-3]}/health"
    eventually(lambda: get(health)[0] == 503)
    deadline = time.monotonic() + 280
    while get(health)[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    try:
        answer = server.ask([message(*question)], max_tokens=20)
    except openai.APIStatusError as error:
        raise AssertionError(error.body) from error
    assert answer.choices[0].message.content == expected
