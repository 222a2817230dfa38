"""Round trips between the layouts for every kind of model, tensor for tensor and byte for byte."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from tests.model_folders import THRESHOLD, routed_model, written_folder
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.checkpoints.layouts import layout_of
from vico.checkpoints.save import save_model
from vico.checkpoints.write import write_hf_folder, write_published_folder
from vico.settings import load_settings

MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
KINDS = {
    "qwen3 tied": {"tied": True},
    "qwen3 untied, rms norm, q/k norm, no qkv bias": {
        "tied": False,
        "vision": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
    },
    "qwen2 untied": {"tied": False, "text": {"model_type": "qwen2"}},
    "qwen2 tied, q/k norm": {"tied": True, "text": {"model_type": "qwen2"}, "vision": {"use_qk_norm": True}},
    "llama untied, biases": {
        "tied": False,
        "text": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    },
    "qwen3_moe untied": {"tied": False, "text": {"model_type": "qwen3_moe", **MOE}},
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def base(request, tmp_path_factory) -> Path:
    """A folder saved by transformers, with the older names."""
    folder = make_tiny_model(tmp_path_factory.mktemp("base") / "m", **request.param)
    assert layout_of(load_file(folder / "model.safetensors")) == "older_hf"
    return folder


@pytest.fixture(scope="module")
def routed(base, tmp_path_factory) -> Path:
    """A policy with its router, as the export stage writes it."""
    return routed_model(base, tmp_path_factory.mktemp("routed") / "m")


def contents(folder: Path) -> dict[str, tuple]:
    """Return dtype, shape and bytes of every tensor in the folder's files, by name."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {
        name: (tensor.dtype, tensor.shape, tensor.view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def assert_same_model(folder: Path, other: Path) -> None:
    first, second = load_model(folder).state_dict(), load_model(other).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_flash_written_from_ours_is_the_same_model(routed, tmp_path):
    flash = written_folder(write_published_folder, routed, tmp_path / "flash")
    names = contents(flash)
    assert layout_of(names) == "published"
    for dead in ("attn3.in_proj_weight", "attn4.out_proj.bias", "norm3.weight", "norm4.bias"):
        assert f"pooling_before_gating.{dead}" in names
    config = json.loads((flash / "config.json").read_text())
    assert config["flash_mode"] is True
    assert (config["flash_relative_threshold"], config["flash_absolute_threshold"]) == (0.0, THRESHOLD)
    assert config["torch_dtype"] == "float32"
    assert load_settings(flash) == load_settings(routed)
    assert_same_model(flash, routed)


@torch.no_grad()
def test_flash_computes_what_ours_computes(routed, tmp_path):
    flash = written_folder(write_published_folder, routed, tmp_path / "flash")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(10, 300, (1, 12), generator=torch.Generator().manual_seed(1))
    outputs = []
    for folder in (routed, flash):
        model = load_model(folder)
        features = model.vision_features(pixels)
        logits = model.base(input_ids=ids).logits
        tokens = model.full_tokens(features), model.compressed_tokens(features)
        outputs.append([*tokens, model.router(features), logits])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True))


def test_custom_to_ours_to_custom_keeps_every_byte(base, tmp_path):
    custom = written_folder(write_published_folder, base, tmp_path / "custom")
    assert "flash_mode" not in json.loads((custom / "config.json").read_text())
    save_model(load_model(custom).state_dict(), custom, tmp_path / "ours")
    back = written_folder(write_published_folder, tmp_path / "ours", tmp_path / "back", base=custom)
    assert contents(back) == contents(custom)
    assert json.loads((back / "config.json").read_text()) == json.loads((custom / "config.json").read_text())


def test_hf_to_ours_to_hf_keeps_every_byte(base, tmp_path):
    hf = written_folder(write_hf_folder, base, tmp_path / "hf")
    save_model(load_model(hf).state_dict(), hf, tmp_path / "ours")
    back = written_folder(write_hf_folder, tmp_path / "ours", tmp_path / "back")
    assert contents(back) == contents(hf)
    custom = written_folder(write_published_folder, hf, tmp_path / "custom")
    assert contents(written_folder(write_hf_folder, custom, tmp_path / "again")) == contents(hf)


def test_bfloat16_keeps_every_byte(base, tmp_path):
    half = load_model(base, torch.bfloat16).state_dict()
    save_model(half, base, tmp_path / "half")
    custom = written_folder(write_published_folder, tmp_path / "half", tmp_path / "custom")
    assert json.loads((custom / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = written_folder(write_hf_folder, custom, tmp_path / "again")
    assert contents(again) == contents(tmp_path / "half")


@torch.no_grad()
def test_plain_transformers_gives_the_full_rate_logits(routed, base, tmp_path):
    hf = written_folder(write_hf_folder, routed, tmp_path / "hf")
    plain, ours = AutoModelForImageTextToText.from_pretrained(hf), load_model(base)
    assert type(plain).__name__ == "InternVLForConditionalGeneration"
    settings = ours.settings
    image = torch.full((1, settings.tokens_full), settings.image_token_id)
    ids = torch.cat([torch.tensor([[10, 11]]), image, torch.tensor([[12, 13, 14]])], dim=1)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    logits = [
        model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
        for model in (plain, AutoModelForImageTextToText.from_pretrained(base))
    ]
    assert torch.equal(*logits)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """A policy with connector and router over a tied head, for tests that need only one kind of model."""
    folder = tmp_path_factory.mktemp("tied")
    return routed_model(make_tiny_model(folder / "base"), folder / "m")


def test_shards_hold_the_same_tensors_as_one_file(tied, tmp_path):
    whole = written_folder(write_published_folder, tied, tmp_path / "whole")
    limit = 200_000
    shards = written_folder(write_published_folder, tied, tmp_path / "shards", shard_bytes=limit)
    files = sorted(shards.glob("*.safetensors"))
    assert len(files) > 3 and not (shards / "model.safetensors").exists()
    assert contents(shards) == contents(whole)
    for path in files:
        assert len(load_file(path)) == 1 or path.stat().st_size < limit + 10_000  # header beside the tensors
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert_same_model(shards, tied)


def test_config_template_code_and_stored_head_come_from_a_published_base(tied, tmp_path):
    base = written_folder(write_published_folder, tied, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    auto_map = {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}
    config |= {"auto_map": auto_map, "flash_absolute_threshold": 0.9, "flash_relative_threshold": 0.5}
    (base / "config.json").write_text(json.dumps(config))
    (base / "modeling_internvl_chat.py").write_text("raise SystemExit('a checkpoint's code was run')\n")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    tensors = load_file(base / "model.safetensors")
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors")
    policy = load_model(base)
    with torch.no_grad():
        policy.lm_head.weight.add_(1)  # tied: the embedding changes too
    save_model(policy.state_dict(), base, tmp_path / "policy")
    flash = written_folder(
        write_published_folder, tmp_path / "policy", tmp_path / "f", base=base, absolute_threshold=0.25
    )
    changed = {"flash_absolute_threshold": 0.25, "flash_relative_threshold": 0.0}
    assert json.loads((flash / "config.json").read_text()) == {**config, **changed}
    for name in ("modeling_internvl_chat.py", "chat_template.jinja", "tokenizer.json"):
        assert (flash / name).read_bytes() == (base / name).read_bytes()
    written = contents(flash)
    assert written.keys() == tensors.keys()
    assert written["language_model.lm_head.weight"] == written["language_model.model.embed_tokens.weight"]
    assert_same_model(flash, tmp_path / "policy")


def test_a_router_file_joins_the_policy(tied, tmp_path):
    model = load_model(tied)
    router = {f"router.{name}": tensor.clone() for name, tensor in model.router.state_dict().items()}
    save_file(router, tmp_path / "router.safetensors")
    policy = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("router.")}
    save_model(policy, tied, tmp_path / "policy")
    router_file = tmp_path / "router.safetensors"
    hf = written_folder(write_hf_folder, tmp_path / "policy", tmp_path / "hf", router_file=router_file)
    assert contents(hf) == contents(tied)
    assert json.loads((hf / "config.json").read_text())["vico"]["router"] is True


def test_hf_from_a_published_folder_has_image_settings_for_transformers(tied, tmp_path):
    custom = written_folder(write_published_folder, tied, tmp_path / "custom")
    clip = {"image_processor_type": "CLIPImageProcessor", "size": 56, "crop_size": 56}
    (custom / "preprocessor_config.json").write_text(json.dumps(clip))
    hf = written_folder(write_hf_folder, custom, tmp_path / "hf")
    processor = AutoImageProcessor.from_pretrained(hf)
    pixels = processor(Image.new("RGB", (112, 56)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, 56, 56)  # two tiles and a thumbnail
    assert load_settings(hf) == load_settings(tied)


def test_the_golden_flash_folder_is_written_unchanged(tmp_path):
    golden = Path(__file__).parents[3] / "data" / "golden" / "flash-tiny"
    back = written_folder(write_published_folder, golden, tmp_path / "back", base=golden)
    weights = load_file(golden / "model.safetensors")
    written = load_file(back / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in written.items())
    assert contents(back).keys() == weights.keys()
    config = json.loads((golden / "config.json").read_text())
    assert json.loads((back / "config.json").read_text()) == {**config, "torch_dtype": "float32"}
