"""`vico init --model` says by the config alone whether a model can be trained, and writes budgets for it."""

import json

import pytest
from typer.testing import CliRunner

from cluster.site_files import load_site
from pipeline.cli import app
from pipeline.commands.model_advice import model_advice
from pipeline.config.graph import pipeline_graph
from pipeline.config.pipeline_file import load_config
from pipeline.planning.request import RunRequest
from pipeline.planning.setups import GPU_BYTES, USABLE, smallest_setup
from pipeline.planning.without_weights import plan_without_weights
from tests.tiny_model import make_tiny_model
from vico.memory.model_sizes import model_sizes
from vico.model_files import model_config

VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}


def init(*arguments):
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


def config_alone(folder, llm_config):
    folder.mkdir()
    config = {"vision_config": VISION, "llm_config": llm_config, "force_image_size": 448}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_published_size_gets_a_site_and_budgets_in_bfloat16(tmp_path):
    model = config_alone(tmp_path / "InternVL3_5-8B", QWEN3_8B)
    shown = init(tmp_path / "p.yaml", "--model", model)
    assert shown.exit_code == 0, shown.output
    setup = smallest_setup(model_sizes(model_config(model)))
    assert f"8.5B parameters: can be trained, on {setup.num_gpus} GPUs of 80 GB or more" in shown.stdout
    assert all(f"\n  {line}\n" in shown.stdout for line in setup.site())
    config = load_config(tmp_path / "p.yaml", pipeline_graph())
    assert config.consistency.tiles_per_pack == setup.tiles_per_pack
    assert config.consistency.reference_tokens_per_pack == setup.tokens_per_pack
    dtypes = {config.consistency.optimizer.dtype, config.router.optimizer.dtype}
    assert {*dtypes, config.ratio.dtype, config.evaluate.dtype} == {"bfloat16"}


def with_layers(layers):
    return {**QWEN3_8B, "num_hidden_layers": layers}


@pytest.mark.parametrize("layers", [1, 4, 12, 36, 100, 180, 1000])
def test_the_file_and_the_site_that_init_gives_work_together(tmp_path, layers, monkeypatch):
    """Nothing is refused or warned about: ranks and packs, CPUs of Ray, GPUs of actors, learning rate."""
    model = config_alone(tmp_path / "m", with_layers(layers))
    shown = init(tmp_path / "p.yaml", "--model", model)
    assert shown.exit_code == 0, shown.output
    advice = model_advice(str(model))
    (tmp_path / "site.yaml").write_text("\n".join(["storage: store", *advice.site()]))
    monkeypatch.chdir(tmp_path)
    site = load_site("site.yaml")
    plan = plan_without_weights(RunRequest(tmp_path / "p.yaml", site), pipeline_graph())
    training = plan.estimates["consistency"].training
    assert (training.refusal, training.warning) == (None, None)
    gpus = advice.setup.num_gpus if advice.setup else 128
    block = load_config(tmp_path / "p.yaml", pipeline_graph())
    assert min(block.consistency.packs_per_step, block.router.packs_per_step) >= gpus
    if advice.setup is not None:
        assert site.resources.workers == site.resources.actors == gpus
        assert site.kind == ("local" if gpus <= 8 else "ray")
        assert training.memory.device == advice.setup.memory.device


def test_a_model_on_the_hub_that_the_project_knows_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("InternVL3_5-8B", "InternVL3_5-8B-HF"):
        shown = init(f"{name}.yaml", "--model", f"OpenGVLab/{name}")
        assert f"OpenGVLab/{name}: InternVL with qwen3, 8.5B parameters: can be trained" in shown.stdout


def test_a_model_that_cannot_be_trained_is_refused_before_anything_is_written(tmp_path):
    model = config_alone(tmp_path / "InternVL3_5-20B", {"architectures": ["GptOssForCausalLM"]})
    refused = init(tmp_path / "p.yaml", "--model", model)
    assert "llm_config.architectures='GptOssForCausalLM' is not supported" in str(refused.exception)
    assert not (tmp_path / "p.yaml").exists()
    refused = init(tmp_path / "p.yaml", "--model", tmp_path / "nowhere")
    assert "is not a folder with a config.json" in str(refused.exception)


def test_a_config_that_is_a_link_out_of_its_folder_is_refused_as_by_a_run(tmp_path):
    model = config_alone(tmp_path / "m", QWEN3_8B)
    (model / "config.json").rename(tmp_path / "elsewhere.json")
    (model / "config.json").symlink_to(tmp_path / "elsewhere.json")
    refused = init(tmp_path / "p.yaml", "--model", model)
    assert "is a link to" in str(refused.exception) and not (tmp_path / "p.yaml").exists()


def test_a_small_model_keeps_the_defaults(tmp_path):
    model = make_tiny_model(tmp_path / "tiny")
    shown = init(tmp_path / "p.yaml", "--model", model)
    assert "0.1M parameters: can be trained\n" in shown.stdout
    assert load_config(tmp_path / "p.yaml", pipeline_graph()).consistency.optimizer.dtype == "float32"


@pytest.mark.parametrize("layers", [1, 36, 200])
def test_the_smallest_setup_fits_and_one_with_fewer_gpus_does_not(tmp_path, layers):
    text = {**QWEN3_8B, "num_hidden_layers": layers}
    sizes = model_sizes(model_config(config_alone(tmp_path / "m", text)))
    setup = smallest_setup(sizes)
    assert setup.memory.device <= USABLE * GPU_BYTES
    smaller = smallest_setup(sizes, int(GPU_BYTES / 4))
    assert smaller is None or smaller.num_gpus >= setup.num_gpus
