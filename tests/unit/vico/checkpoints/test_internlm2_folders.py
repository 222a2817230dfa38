"""InternLM2 language models of published folders: opened as the Llama that they are, and written back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.model_folders import THRESHOLD, changed_copy, internlm2_folder, routed_model, written_folder
from tests.tiny_model import make_tiny_model
from tests.unit.vico.checkpoints.test_layout_folders import assert_same_model, contents
from tests.unit.vico.checkpoints.test_unread import assert_same_model as assert_same_unread
from vico.checkpoints import load_model
from vico.checkpoints.language_model import language_model_folder
from vico.checkpoints.save import save_model
from vico.checkpoints.write import write_hf_folder, write_published_folder
from vico.errors import UserError
from vico.model_files import model_config, sequence_limit
from vico.prompt import load_prompt_format

TEXT = {"model_type": "llama", "attention_bias": True, "num_attention_heads": 6, "num_key_value_heads": 2}
IDS = torch.randint(10, 300, (1, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A published folder with the Llama that the InternLM2 of `internlm2` was made of."""
    folder = tmp_path_factory.mktemp("llama")
    tiny = make_tiny_model(folder / "tiny", tied=False, text={**TEXT, "head_dim": 8})
    return written_folder(write_published_folder, tiny, folder / "m")


@pytest.fixture(scope="module")
def internlm2(llama, tmp_path_factory) -> Path:
    return internlm2_folder(llama, tmp_path_factory.mktemp("internlm2") / "m")


def test_it_opens_as_the_llama_that_it_was_made_of(llama, internlm2):
    names = load_file(internlm2 / "model.safetensors")
    assert "language_model.model.layers.1.attention.wqkv.bias" in names
    assert not any("self_attn" in name or "lm_head" in name for name in names)
    assert_same_model(internlm2, llama)
    assert_same_unread(internlm2, torch.bfloat16)
    text = model_config(internlm2)["text_config"]
    assert (text["model_type"], text["attention_bias"], text["mlp_bias"]) == ("llama", True, False)
    assert "auto_map" not in text


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_policy_is_written_back_byte_for_byte(internlm2, tmp_path, shard_bytes):
    save_model(load_model(internlm2).state_dict(), internlm2, tmp_path / "ours")
    for name, source in (("trained", tmp_path / "ours"), ("copied", internlm2)):
        options = {"base": internlm2, "shard_bytes": shard_bytes}
        back = written_folder(write_published_folder, source, tmp_path / name, **options)
        assert contents(back) == contents(internlm2)
        config = json.loads((back / "config.json").read_text())
        assert config == json.loads((internlm2 / "config.json").read_text())


@torch.no_grad()
def test_a_routed_policy_opens_again_from_both_layouts(internlm2, tmp_path):
    routed = routed_model(internlm2, tmp_path / "routed")
    flash = written_folder(write_published_folder, routed, tmp_path / "flash", base=internlm2)
    assert "language_model.output.weight" in contents(flash)
    assert json.loads((flash / "config.json").read_text())["flash_absolute_threshold"] == THRESHOLD
    assert_same_model(flash, routed)
    hf = written_folder(write_hf_folder, flash, tmp_path / "hf")
    assert_same_model(hf, routed)
    plain = AutoModelForImageTextToText.from_pretrained(hf)
    assert type(plain.model.language_model).__name__ == "LlamaModel"
    logits = load_model(internlm2).base(input_ids=IDS).logits
    torch.testing.assert_close(plain(input_ids=IDS).logits, logits, rtol=0, atol=0)
    text = AutoModelForCausalLM.from_pretrained(language_model_folder(flash, tmp_path / "text"))
    torch.testing.assert_close(text(input_ids=IDS).logits, logits, rtol=0, atol=0)
    without_base = written_folder(write_published_folder, routed, tmp_path / "llama")
    config = json.loads((without_base / "config.json").read_text())
    assert config["llm_config"]["architectures"] == ["LlamaForCausalLM"]
    assert_same_model(without_base, routed)


def test_a_head_stored_beside_a_tied_embedding_stays_stored(internlm2, tmp_path):
    def tie(config, tensors):
        config["llm_config"]["tie_word_embeddings"] = True
        embedding = tensors["language_model.model.tok_embeddings.weight"]
        tensors["language_model.output.weight"] = embedding.clone()

    tied = changed_copy(internlm2, tmp_path / "tied", tie)
    save_model(load_model(tied).state_dict(), tied, tmp_path / "ours")
    back = written_folder(write_published_folder, tmp_path / "ours", tmp_path / "back", base=tied)
    assert contents(back) == contents(tied)


def test_positions_beyond_dynamic_scaling_are_known(llama, internlm2):
    assert sequence_limit(internlm2) == 4096
    assert sequence_limit(llama) is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_pos_id_version": "v2pe_fix"}, "rope_pos_id_version='v2pe_fix' is not supported"),
        ({"num_key_value_heads": 4}, "6 heads do not share 4 key heads evenly"),
        ({"num_key_value_heads": 3}, "wrongly shaped|does not split into 3 equal parts"),
        ({"bias": False}, r"surplus tensors in the weights: model\.\S+\.0\.self_attn.k_proj.bias"),
        (
            {"architectures": ["InternLM3ForCausalLM"], "qkv_bias": False, "bias": True},
            "qkv_bias=False with bias=True is not supported, only equal values are",
        ),
    ],
)
def test_a_config_that_cannot_be_opened_is_refused(internlm2, tmp_path, change, message):
    folder = changed_copy(internlm2, tmp_path / "m", lambda config, _: config["llm_config"].update(change))
    with pytest.raises(UserError, match=message):
        load_model(folder)


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_a_tokenizer_of_the_checkpoints_own_code_is_refused_with_the_remedy(internlm2, tmp_path, file):
    folder = changed_copy(internlm2, tmp_path / "m", lambda config, _: None)
    (folder / "tokenizer.json").rename(folder / file)
    names = ["tokenization_internlm2.InternLM2Tokenizer", None]
    config = {"auto_map": {"AutoTokenizer": names}, "tokenizer_class": "InternLM2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_internlm2.py").write_text("raise SystemExit('a checkpoint's code was run')\n")
    message = f"its tokenizer {names[0]} is Python code of the checkpoint, which is never run; copy"
    with pytest.raises(UserError, match=message):
        load_prompt_format(folder)
