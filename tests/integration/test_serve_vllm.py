"""`vico serve --engine vllm`: the built-in engine's answers, many at once, and a vLLM that is killed.

vLLM has its own environment; the variable VICO_VLLM_PYTHON names its Python (docs/serving.md).
"""

import os
import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
import torch
from PIL import Image

from pipeline.serving.vllm.process import engine_arguments
from tests.integration.test_serve import SMALL, expected_answer
from tests.integration.test_serve_decoding import demo_questions, message
from tests.served import Served, get
from tests.waiting import PATIENCE_S, wait_for_end, wait_until
from vico.checkpoints import load_model
from vico.checkpoints.language_model import language_model_folder
from vico.checkpoints.save import save_model
from vico.errors import UserError
from vico.inference.tile_losses import encoded_tiles
from vico.packing import TiledSequence
from vico.prompt import load_prompt_format
from vico.settings import load_settings
from vico.tiling import pixel_values

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
        _, errors = server.process.communicate(timeout=PATIENCE_S)
        assert server.process.returncode == 2 and words in errors
        assert errors.startswith("error: ") and errors.count("\n") == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Return the folder of the demo model with a router, whose decisions differ between tiles."""
    folder = tmp_path_factory.mktemp("model") / "routed"
    torch.manual_seed(3)
    model = load_model(SMALL)
    model.add_compressed_connector(1)
    model.add_router(2)
    with torch.no_grad():
        model.router.gating.gate[1].weight.mul_(30)
    save_model(model.state_dict(), SMALL, folder, {"absolute_threshold": 0.5})
    return folder


@pytest.fixture(scope="module")
def server(model):
    options = ["--engine", "vllm", "--engine-python", str(PYTHON), "--engine-arg=--enforce-eager"]
    options += ["--max-requests", "128", "--max-requests-per-client", "128", "--max-total-tokens", "2048"]
    server = Served(model, *options, "--max-batch", "64", "--cache-tokens", str(64 * 2048)).started()
    yield server
    code, _ = server.end()
    assert code == 0


def is_tie(model: Path, turns: list[dict[str, Any]], images: list[Image.Image], text: str, rule: str) -> bool:
    """Whether `text` leaves our answer at a token that is as likely as ours, except for rounding."""
    ours = load_model(model)
    prompts = load_prompt_format(model)
    pixels = [pixel_values(image, ours.settings.tiling()) for image in images]
    skeleton = prompts.encode(turns, [len(tiles) for tiles in pixels], add_generation_prompt=True)
    compressed = np.zeros(skeleton.num_tiles, bool)
    tiles = torch.from_numpy(np.concatenate(pixels))
    with torch.no_grad():
        if rule == "absolute":
            compressed = (ours.router.compress_probability(ours.vision_features(tiles)) >= 0.5).numpy()
        encoded = encoded_tiles(ours, np.concatenate(pixels), 64)
        [embeds_LD] = encoded.embeddings([TiledSequence(skeleton, compressed, 0)])
        ids = torch.tensor([*prompts.tokenizer(text)["input_ids"], prompts.end_of_turn_id])
        answer = ours.base.get_input_embeddings()(ids)
        logits = ours.base(inputs_embeds=torch.cat([embeds_LD, answer])[None]).logits[0]
    logits = logits[len(embeds_LD) - 1 : -1].log_softmax(-1)
    gaps = logits.max(-1).values - logits.gather(1, ids[:, None])[:, 0]
    return bool((gaps < 1e-3).all())


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["full", "absolute"])
def test_vllm_gives_the_built_in_answers(server, model, rule):
    """64 requests at once. An answer may differ only by a tie."""
    questions = demo_questions(NUM_QUESTIONS)
    options = {"max_tokens": 40, "extra_body": {"vico": {"rule": rule}}}
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda q: server.ask([message(*q)], **options), questions))
    num_ties = num_visual = num_full = 0
    for (turns, images), answer in zip(questions, answers, strict=True):
        expected = expected_answer(model, turns, images, 40, rule == "absolute")
        text = answer.choices[0].message.content
        if text != expected.text:
            num_ties += 1
            assert is_tie(model, turns, images, text, rule), (text, expected.text)
        else:
            assert answer.usage.completion_tokens == expected.num_new
        assert answer.usage.prompt_tokens == expected.num_prompt
        assert answer.usage.prompt_tokens_details.image_tokens == expected.num_visual
        num_visual += expected.num_visual
        num_full += len(expected.compressed) * load_settings(model).tokens_full
    print(f"{rule}: {len(questions)} answers, {num_ties} ties, {num_visual} of {num_full} visual tokens")
    assert (num_visual == num_full) == (rule == "full")


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


def processes_of(server: Served) -> dict[str, int]:
    """Return the processes of a server's vLLM: `server`, which vico started, and its child `engine`."""

    def children(pid: int) -> list[int]:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]

    [vllm] = [
        pid
        for pid in children(server.process.pid)
        if b"vllm.entrypoints" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    [engine] = [pid for pid in children(vllm) if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return {"server": vllm, "engine": engine}


def num_running(server: Served) -> float:
    """Return the number of requests that vLLM itself works on."""
    arguments = Path(f"/proc/{processes_of(server)['server']}/cmdline").read_bytes().split(b"\0")
    port = int(arguments[arguments.index(b"--port") + 1])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
        lines = answer.read().decode().splitlines()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))


def long_answers(server: Served, number: int) -> list[Any]:
    """Return running streams of answers at a high temperature, of which most are long."""
    [question] = demo_questions(1)
    options = {"max_tokens": 1000, "temperature": 2, "stream": True}
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(lambda n: server.ask([message(*question)], seed=n, **options), range(number)))


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["engine", "server"])
def test_a_killed_vllm_is_reported_and_starts_again(server, victim):
    """Running answers end with a 503; the next answers are as before."""
    [question] = demo_questions(1)
    expected = server.ask([message(*question)], max_tokens=20).choices[0].message.content
    killed = processes_of(server)
    left = [psutil.Process(pid) for pid in killed.values()]
    streams = long_answers(server, 16)
    os.kill(killed[victim], signal.SIGKILL)
    errors = []
    for stream in streams:
        try:
            list(stream)
        except openai.APIError as error:
            errors.append(error.message)
    assert errors and all("vLLM did not finish the answer" in error for error in errors), errors
    health = f"{server.url[:-3]}/health"
    wait_until(lambda: get(health)[0] == 503)
    assert get(health)[1]["status"] == "starting"
    wait_until(lambda: get(health)[0] == 200, pause_s=0.5)
    answer = server.ask([message(*question)], max_tokens=20)
    assert answer.choices[0].message.content == expected
    assert not set(killed.values()) & set(processes_of(server).values())
    wait_for_end(left)


@needs_vllm
@pytest.mark.slow
def test_a_client_that_leaves_ends_its_request_in_vllm(server):
    streams = long_answers(server, 16)
    assert num_running(server) > 0
    for stream in streams:
        stream.close()
    wait_until(lambda: get(f"{server.url[:-3]}/health")[1]["requests"] == 0)
    wait_until(lambda: num_running(server) == 0)


@needs_vllm
@pytest.mark.slow
def test_vllm_ends_with_a_server_that_is_killed(model):
    options = ["--engine", "vllm", "--engine-python", str(PYTHON), "--engine-arg=--enforce-eager"]
    server = Served(model, *options, "--max-total-tokens", "2048").started()
    left = [psutil.Process(pid) for pid in processes_of(server).values()]
    server.process.kill()
    server.process.wait()
    wait_for_end(left)
