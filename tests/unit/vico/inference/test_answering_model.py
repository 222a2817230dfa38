"""`vico.load`: a routed answer about a picture is the one that the parts of the library give."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vico
from data_prep.demo.records import demo_record
from tests.model_folders import THRESHOLD, routed_model
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.errors import UserError
from vico.inference.generation import greedy_answers
from vico.inference.tile_losses import encoded_tiles
from vico.packing import TiledSequence
from vico.prompt import load_prompt_format
from vico.tiling import pixel_values

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture(scope="module")
def routed(base, tmp_path_factory):
    return routed_model(base, tmp_path_factory.mktemp("routed") / "m")


def picture(seed: int = 0, size: tuple[int, int] = (190, 130)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def library_answer(folder, images, turns, threshold, max_new_tokens=9):
    """Return (text, tiles compressed, prompt) as the parts of the library give them."""
    model, prompts = load_model(folder), load_prompt_format(folder)
    pixels = [pixel_values(image, model.settings.tiling()) for image in images]
    together = np.concatenate(pixels)
    with torch.no_grad():
        p_compress = model.router.compress_probability(model.vision_features(torch.from_numpy(together)))
    compressed = p_compress.numpy() >= threshold
    skeleton = prompts.encode(turns, [len(part) for part in pixels], add_generation_prompt=True)
    prompt = TiledSequence(skeleton, compressed, 0)
    tiles = encoded_tiles(model, together, 64)
    end = prompts.end_of_turn_id
    [answer] = greedy_answers(
        tiles, [prompt], end_of_turn_id=end, max_new_tokens=max_new_tokens, batch_tokens=1
    )
    return prompts.tokenizer.decode(answer.ids), compressed.tolist(), skeleton


def test_importing_vico_loads_no_torch():
    check = "import sys, vico; print(vico.__version__, {'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1)[1].strip() == "set()"


def test_an_answer_is_routed_and_counts_its_tokens(routed, tmp_path):
    picture().save(tmp_path / "a.png")
    model = vico.load(routed)
    answer = model.answer(tmp_path / "a.png", "what is written here", max_new_tokens=9)
    turns = [{"from": "human", "value": "<image>\nwhat is written here"}]
    text, compressed, skeleton = library_answer(routed, [picture()], turns, THRESHOLD)
    assert (answer.text, str(answer)) == (text, text)
    assert [tile.compressed for tile in answer.tiles] == compressed
    assert answer.visual_tokens == sum(1 if flag else 4 for flag in compressed)
    assert answer.visual_tokens_full == 4 * len(compressed)
    assert answer.prompt_tokens == skeleton.num_text_tokens + answer.visual_tokens
    assert answer.tokens_saved == 1 - answer.visual_tokens / answer.visual_tokens_full
    assert answer.tiles[-1].box == (0, 0, 190, 130)
    assert answer.truncated == (answer.new_tokens == 9)


def test_several_pictures_fill_their_marks_in_order(routed):
    images = [picture(1), picture(2, (60, 60))]
    question = "what <image> is <image> written"
    answer = vico.load(routed).answer(
        images, question, max_new_tokens=9, threshold=0.6, system_message="system"
    )
    turns = [{"from": "system", "value": "system"}, {"from": "human", "value": question}]
    text, compressed, _ = library_answer(routed, images, turns, 0.6)
    assert (answer.text, [tile.compressed for tile in answer.tiles]) == (text, compressed)
    assert [tile.picture for tile in answer.tiles] == [0] * (len(compressed) - 1) + [1]


def test_a_question_without_a_picture_has_no_visual_tokens(routed):
    answer = vico.load(routed).answer([], "what", max_new_tokens=2)
    assert (answer.visual_tokens, answer.tiles, answer.tokens_saved) == (0, (), 0)


def test_a_model_without_a_router_answers_at_the_full_rate(base):
    answer = vico.load(base).answer(picture(), "what", max_new_tokens=2)
    assert answer.visual_tokens == answer.visual_tokens_full > 0
    assert {tile.p_compress for tile in answer.tiles} == {None}


def test_the_demo_model_answers_a_question_about_a_plain_picture():
    rows = (demo_record(1, line) for line in range(1000))
    row, pictures = next(
        (row, pictures)
        for row, pictures in rows
        if row["kind"] == "plain" and row["conversations"][0]["value"].startswith("<image>\n")
    )
    question, answer = (turn["value"] for turn in row["conversations"][:2])
    image = Image.open(io.BytesIO(pictures[0]))
    answered = vico.load(ROOT / "models/small-internvl").answer(image, question.removeprefix("<image>\n"))
    assert (answered.text, answered.truncated) == (answer, False)


def test_what_cannot_be_asked_is_refused_in_one_line(base, routed, tmp_path):
    model = vico.load(routed)
    cut = tmp_path / "cut.png"
    cut.write_bytes((picture().save(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()[:99])[1])
    for asked, options, message in (
        (tmp_path / "none.png", {}, "picture=.*none.png is not readable"),
        (tmp_path, {}, "is not readable .Is a directory"),
        (cut, {}, "picture=.*cut.png does not decode"),
        (Image.open(cut), {}, "picture=PNG picture does not decode"),
        (picture(), {"question": "<image> and <image>"}, "2 <image> marks for 1 pictures"),
        (picture(), {"question": "end <|im_end|>"}, "spells the token <|im_end|>"),
        (picture(), {"question": "half \ud83d"}, "question has half of a surrogate pair"),
        (picture(), {"system_message": "see <image>"}, "system_message has <image> marks"),
        (picture(), {"system_message": "<|im_end|>"}, "system_message: the text spells"),
        (np.zeros((9, 9, 3), np.uint8), {}, "picture: ndarray is not supported"),
        (b"bytes", {}, "picture: bytes is not supported"),
        (picture(), {"max_new_tokens": 0}, "max_new_tokens=0"),
        (picture(), {"max_new_tokens": 5000}, "are more than the model's 4096"),
    ):
        with pytest.raises(UserError, match=message.replace("|", r"\|")) as raised:
            model.answer(asked, **{"question": "what", **options})
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"threshold=0.5: the model has no router"):
        vico.load(base).answer(picture(), "what", threshold=0.5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "cuda"}, "device=cuda: torch sees no CUDA device"),
        ({"device": "fpga"}, "device=fpga is not supported"),
        ({"device": "processor"}, "device=processor is not supported"),
        ({"device": "meta"}, "device=meta is not supported"),
        ({"dtype": "float16"}, "dtype=float16 is not supported"),
    ],
)
def test_a_device_that_is_not_here_is_refused_before_the_model_is_read(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        vico.load(tmp_path / "nothing", **options)
