"""An exported folder in plain transformers, in a process without this project, and our own model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InternVLForConditionalGeneration

from tests.tiny_model import SPECIAL, make_tiny_model
from vico.checkpoints import load_model
from vico.checkpoints.save import save_model
from vico.checkpoints.write import write_hf_folder
from vico.inference.calibration import placed_threshold
from vico.inference.generation import greedy_answers
from vico.inference.routing import absolute_rule
from vico.inference.tile_losses import encoded_tiles
from vico.model_files import stored_threshold
from vico.packing import TiledSequence
from vico.prompt import load_prompt_format
from vico.settings import load_settings
from vico.tiling import pixel_values

END = SPECIAL.index("<|im_end|>")
QUESTIONS = (("what is written here", (190, 130)), ("is it", None), ("system what", (60, 200)))
SCRIPT = """
import json, sys, torch
import numpy as np
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, out = sys.argv[1:]
assert "vico" not in sys.modules
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
conversations = []
for n, (question, size) in enumerate(json.load(open(f"{out}/questions.json"))):
    picture = [] if size is None else [{"type": "image", "image": Image.open(f"{out}/{n}.png")}]
    conversations.append([{"role": "user", "content": [*picture, {"type": "text", "text": question}]}])
inputs = processor.apply_chat_template(
    conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    outputs = model(**inputs)
    full = model(**inputs, threshold=2.0)
ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
several = model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2)
given = inputs["input_ids"]
assert len(several) == 2 * len(ids) and torch.equal(several[::2, :given.shape[1]], given)
conversations[0][0]["content"][0] = {"type": "image", "path": f"{out}/0.png"}
conversations[2][0]["content"][0] = {"type": "image", "image": np.array(Image.open(f"{out}/2.png"))}
again = processor.apply_chat_template(
    conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
assert torch.equal(again["pixel_values"], inputs["pixel_values"]), "paths and arrays are pictures"
try:
    processor(images=[3], text="<IMG_CONTEXT>")
except ValueError as error:
    assert "int is not supported" in str(error)
torch.save({"logits": outputs.logits, "mask": outputs.attention_mask, "compressed": outputs.compressed,
    "full": full.logits, "ids": ids[:, inputs["input_ids"].shape[1]:]}, f"{out}/outputs.pt")
"""


def pictures() -> list[Image.Image | None]:
    random = np.random.default_rng(5)
    return [
        None if size is None else Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), np.uint8))
        for _, size in QUESTIONS
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A model with connector, router and threshold as it is saved, and as it is exported."""
    root = tmp_path_factory.mktemp("models")
    model = load_model(make_tiny_model(root / "base"))
    model.add_compressed_connector(1)
    model.add_router(2)
    pixels = np.concatenate([pixel_values(image, model.settings.tiling()) for image in pictures() if image])
    with torch.no_grad():  # between those of the tiles, so that decisions differ
        probability = model.router.compress_probability(model.vision_features(torch.from_numpy(pixels)))
    threshold = placed_threshold(probability.numpy(), 0.5).value
    save_model(model.state_dict(), root / "base", root / "saved", {"absolute_threshold": threshold})
    (root / "exported").mkdir()
    write_hf_folder(root / "saved", root / "exported")
    return root / "saved", root / "exported"


def without_the_project(code: str, folder: Path, *arguments: Path) -> str:
    """Run a program in `folder`, where it cannot import this project, and return what it prints."""
    (folder / "script.py").write_text(code)
    command = [sys.executable, "-P", str(folder / "script.py"), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_example_of_the_page_answers(folders, tmp_path):
    page = (Path(__file__).parents[4] / "docs" / "serving.md").read_text(encoding="utf-8")
    [example] = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if '"OUT"' in code]
    code = example.replace('"OUT"', repr(str(folders[1]))).replace('"text": "..."', '"text": "what is"')
    pictures()[0].save(tmp_path / "0.png")
    picture = "from PIL import Image\npicture = Image.open('0.png')\n"
    assert without_the_project(f"{picture}{code}", tmp_path).startswith("['")


def test_plain_transformers_routes_a_batch_as_we_do(folders, tmp_path):
    saved, exported = folders
    images = pictures()
    for n, image in enumerate(images):
        if image is not None:
            image.save(tmp_path / f"{n}.png")
    (tmp_path / "questions.json").write_text(json.dumps(QUESTIONS))
    without_the_project(SCRIPT, tmp_path, exported, tmp_path)
    theirs = torch.load(tmp_path / "outputs.pt")

    model, form = load_model(saved), load_prompt_format(saved)
    pixels = [pixel_values(image, model.settings.tiling()) for image in images if image is not None]
    tiles = encoded_tiles(model, np.concatenate(pixels), 64)
    with torch.no_grad():
        probability = model.router.compress_probability(
            model.vision_features(torch.from_numpy(np.concatenate(pixels)))
        )
    compressed = absolute_rule(probability, stored_threshold(saved)).numpy()
    assert 0 < compressed.sum() < len(compressed)
    assert theirs["compressed"].numpy().tolist() == compressed.tolist()
    for rates, logits, mask in (
        (compressed, theirs["logits"], theirs["mask"]),
        (np.zeros_like(compressed), theirs["full"], None),
    ):
        first, prompts, counts = 0, [], iter(map(len, pixels))
        for (question, _), image in zip(QUESTIONS, images, strict=True):
            count = 0 if image is None else next(counts)
            value = question if image is None else f"<image>\n{question}"
            turns = [{"from": "human", "value": value}]
            skeleton = form.encode(turns, [count] if count else [], add_generation_prompt=True)
            prompts.append(TiledSequence(skeleton, rates[first : first + count], first))
            first += count
        for b, embeds_LD in enumerate(tiles.embeddings(prompts)):
            with torch.no_grad():
                ours = model.base(inputs_embeds=embeds_LD[None], use_cache=False).logits[0]
            assert mask is None or int(mask[b].sum()) == len(ours)
            torch.testing.assert_close(logits[b, -len(ours) :], ours, atol=2e-4, rtol=1e-4)
        if mask is not None:
            answers = greedy_answers(
                tiles, prompts, end_of_turn_id=form.end_of_turn_id, max_new_tokens=8, batch_tokens=9999
            )
            for answer, ids in zip(answers, theirs["ids"], strict=True):
                assert ids[: len(answer.ids)].tolist() == answer.ids.tolist()


def test_without_our_code_the_folder_is_the_full_rate_model(folders):
    saved, exported = folders
    assert load_settings(exported) == load_settings(saved)
    plain = InternVLForConditionalGeneration.from_pretrained(exported)
    ours = load_model(exported)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, ours.base.get_parameter(name)), name


@pytest.mark.parametrize(
    "named, text, expected",
    [(3, 5, [END, 3]), ([3, END], 5, [END, 3]), (None, 5, [END, 5]), (None, None, END), (END, None, END)],
)
def test_an_answer_of_plain_transformers_ends_at_the_end_of_turn(folders, tmp_path, named, text, expected):
    """Pretrained checkpoints name only the end of a text, in generation_config.json or in the text config."""
    base = shutil.copytree(folders[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["eos_token_id"] = text
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").unlink(missing_ok=True)
    if named is not None:
        content = {"eos_token_id": named, "temperature": 0.5}
        (base / "generation_config.json").write_text(json.dumps(content))
    (tmp_path / "exported").mkdir()
    write_hf_folder(base, tmp_path / "exported")
    written = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert written == {"eos_token_id": expected} | ({"temperature": 0.5} if named is not None else {})


def test_a_model_without_router_gets_no_code(tmp_path):
    make_tiny_model(tmp_path / "base")
    (tmp_path / "out").mkdir()
    write_hf_folder(tmp_path / "base", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_published_epsilon_of_the_towers_norm_is_used(tmp_path):
    vision = {"use_qk_norm": True, "norm_type": "rms_norm", "qk_norm_eps": 0.5}
    model = load_model(make_tiny_model(tmp_path / "base", vision=vision))
    model.add_compressed_connector(1)
    model.add_router(2)
    save_model(model.state_dict(), tmp_path / "base", tmp_path / "saved", {"absolute_threshold": 0.5})
    (tmp_path / "exported").mkdir()
    write_hf_folder(tmp_path / "saved", tmp_path / "exported")
    code = """
import sys
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
layers = [layer.attention for layer in model.model.vision_tower.encoder.layer]
print({norm.variance_epsilon for layer in layers for norm in (layer.q_norm, layer.k_norm)})
"""
    assert without_the_project(code, tmp_path, tmp_path / "exported") == "{0.5}\n"
