"""`vico plan` of the configs for published models, whose weights are not here, and of sites too small."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from cluster.site import Site
from cluster.site_files import load_site
from docs.make_models import published
from pipeline.config.graph import pipeline_graph
from pipeline.planning.request import RunRequest
from pipeline.planning.setups import smallest_setup
from pipeline.planning.without_weights import PUBLISHED, plan_without_weights
from tests.tiny_model import make_tiny_model
from tests.waiting import PATIENCE_S
from vico.memory.model_sizes import model_sizes
from vico.memory.speed import PackWork, pack_flops
from vico.model_files import model_config
from vico.published_config import hf_config

ROOT = Path(__file__).parents[4]
CONFIGS = ROOT / "configs"
PUBLISHED_PARAMETERS = {"1B": 1.06e9, "2B": 2.35e9, "4B": 4.73e9, "8B": 8.53e9, "30B-A3B": 30.85e9}
LANGUAGE = {"1B": "0.6B", "2B": "1.7B", "4B": "4B", "8B": "8B", "30B-A3B": "30B-A3B"}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def planned(size, site, *overrides):
    request = RunRequest(config=CONFIGS / f"internvl3_5-{size.lower()}.yaml", site=site, overrides=overrides)
    plan = plan_without_weights(request, pipeline_graph())
    assert plan is not None and "no weights here" in plan.note
    assert {stage.fingerprint for stage in plan.planned} == {""}
    return plan.estimates["consistency"].training


def test_stages_that_never_ran_have_an_end_and_an_estimate():
    site = load_site(ROOT / "sites" / "slurm.yaml")
    request = RunRequest(config=CONFIGS / "internvl3_5-1b.yaml", site=site)
    estimates = plan_without_weights(request, pipeline_graph()).estimates
    ratio = estimates["ratio"].inference
    assert ratio.num_samples == 42_000 and ratio.num_actors == 16  # 32 actors on half a GPU each
    assert 30 < ratio.seconds_per_1000 < 600
    assert "at most 42,000 samples in 3 splits: about" in "".join(estimates["ratio"].lines())
    assert "at most 2,000 samples, answered at about" in "".join(estimates["evaluate"].lines())
    request = RunRequest(
        config=CONFIGS / "internvl3_5-1b.yaml",
        site=site,
        overrides=("ratio.max_samples=0", "ratio.max_test_samples=null"),
    )
    text = "".join(plan_without_weights(request, pipeline_graph()).estimates["ratio"].lines())
    assert text.startswith("all samples in 3 splits: about") and "in all" not in text


def with_settings(site, **memory):
    settings = site.train.memory.model_copy(update=memory)
    return site.model_copy(update={"train": site.train.model_copy(update={"memory": settings})})


@pytest.mark.parametrize("size", PUBLISHED_PARAMETERS)
def test_the_configs_have_the_published_sizes(size):
    config = model_config(PUBLISHED / "OpenGVLab" / f"InternVL3_5-{size}")
    assert model_sizes(config).base == pytest.approx(PUBLISHED_PARAMETERS[size], rel=2e-3)
    # and the table of docs/models.md is about the same models
    of_page = hf_config(published("300M", f"Qwen3-{LANGUAGE[size]}"), None, "")
    assert model_sizes(config) == model_sizes(of_page)


@pytest.mark.parametrize("size", ["1B", "2B", "4B", "8B"])
@pytest.mark.parametrize("name", ["slurm", "ray", "kuberay"])
def test_the_example_sites_fit_the_dense_models(size, name):
    training = planned(size, load_site(ROOT / "sites" / f"{name}.yaml"))
    assert training.refusal is None
    assert training.memory.device <= 0.9 * 80e9
    assert training.tokens_per_second > 0 and training.disk > 3 * training.checkpoint


def test_a_site_too_small_is_refused_and_the_remedy_fits():
    site = load_site(ROOT / "sites" / "slurm.yaml")
    refusal = planned("30B-A3B", site).refusal
    assert "resources.gpu_memory_gb=80 leaves 72.0 GB" in refusal
    assert "set train.memory.zero_stage: 3, train.memory.reference: sharded (about" in refusal
    assert planned("30B-A3B", with_settings(site, zero_stage=3, reference="sharded")).refusal is None


@pytest.mark.parametrize(("memory", "fits"), [(160, True), (80, False)])
def test_a_stage_whose_models_do_not_fit_is_refused_before_the_training(memory, fits):
    """The training of 30B-A3B is spread over the GPUs; the actors of ratio each hold policy and reference."""
    site = Site.model_validate(slurm(gpu_memory_gb=memory))
    request = RunRequest(config=CONFIGS / "internvl3_5-30b-a3b.yaml", site=site)
    estimates = plan_without_weights(request, pipeline_graph()).estimates
    refusal = estimates["ratio"].refusal
    assert "GB of GPU memory for policy and reference of each of 2 actors per GPU alone" in refusal
    assert float(refusal.split()[2]) == pytest.approx(2 * 2 * 2 * 30.9, rel=0.01)
    if fits:
        overrides = slurm(gpu_memory_gb=memory)
        own = overrides["resources"]["stages"]["ratio"]
        for setting in refusal.partition("; set ")[2].split(", "):
            path, _, value = setting.partition(": ")
            own[path.rpartition(".")[2]] = yaml.safe_load(value)
        assert own["gpus_per_worker"] == 1 and own["actors"] == 16
        request = RunRequest(config=request.config, site=Site.model_validate(overrides))
        estimates = plan_without_weights(request, pipeline_graph()).estimates
        assert estimates["ratio"].refusal is None and estimates["evaluate"].refusal is None
    else:
        assert "at least 137 GB" in refusal and "--until consistency" in refusal
        assert "refused: " in "".join(estimates["evaluate"].lines())


def slurm(**resources):
    """Return the content of the site file with other resources."""
    content = json.loads(load_site(ROOT / "sites" / "slurm.yaml").model_dump_json())
    content["resources"] |= resources
    return content


def applied(refusal, content):
    """Change the content of a site file by the settings that a refusal names, as a user would; return the
    overrides of the pipeline file."""
    overrides = []
    for setting in refusal.partition("; set ")[2].partition(" (about")[0].split(", "):
        path, _, value = setting.partition(": ")
        value = value.partition(" for ")[0]
        if path.startswith("count of "):
            [group] = [group for group in content["nodes"] if group["name"] == path.split()[2]]
            group["count"] = int(value)
            continue
        *blocks, last = path.split(".")
        if blocks[0] in ("consistency", "shard"):
            overrides.append(f"{path}={value}")
            continue
        block = content
        for part in blocks:
            block = block.setdefault(part, {})
        block[last] = yaml.safe_load(value)
    return overrides


def assert_the_remedy_fits(size, content, *overrides):
    refusal = planned(size, Site.model_validate(content), *overrides).refusal
    more = applied(refusal, content)
    assert planned(size, Site.model_validate(content), *overrides, *more).refusal is None
    return refusal


@pytest.mark.parametrize(
    ("workers", "gigabytes", "named"),
    [
        (8, 80, "train.memory.activation_checkpointing: full"),
        (4, 80, "train.memory.zero_stage: 3"),
        (16, 24, "train.memory.offload: optimizer"),
        (2, 30, "resources.workers: "),
    ],
)
def test_the_named_settings_make_it_fit(workers, gigabytes, named):
    content = slurm(workers=workers, gpu_memory_gb=gigabytes)
    assert named in assert_the_remedy_fits("8B", content)


ROWS, LONG = {"kl_chunk_rows": 16384}, ("consistency.reference_tokens_per_pack=131072",)


@pytest.mark.parametrize(
    ("size", "workers", "gigabytes", "memory", "overrides", "named"),
    [
        ("1B", 1, 60, ROWS, (), "train.memory.kl_chunk_rows: 1024"),
        ("8B", 1, 24, {}, LONG, "consistency.reference_tokens_per_pack: "),
        ("4B", 16, 16, {}, ("consistency.optimizer.dtype=float32",), "optimizer.dtype: bfloat16"),
        ("4B", 16, 12, {}, (), "train.deepspeed.zero_optimization.reduce_bucket_size: "),
    ],
)
def test_the_named_settings_are_of_every_kind(size, workers, gigabytes, memory, overrides, named):
    content = slurm(workers=workers, gpu_memory_gb=gigabytes)
    content["train"]["memory"] |= memory
    assert named in assert_the_remedy_fits(size, content, *overrides)


def test_more_nodes_are_named_if_the_present_ones_are_too_few():
    content = slurm(workers=16, gpu_memory_gb=40)
    content["nodes"][0]["memory_gib"] = 100  # too little to offload
    refusal = assert_the_remedy_fits("30B-A3B", content)
    assert "resources.workers: 32, count of gpu in nodes: 4" in refusal and "offload" not in refusal


def test_more_ranks_are_named_only_if_every_stage_and_the_nodes_take_them():
    content = slurm(workers=2, gpu_memory_gb=24)
    refusal = assert_the_remedy_fits("8B", content, "router.packs_per_step=8")
    assert content["resources"]["workers"] <= 8 and "count of" not in refusal
    own = slurm(workers=2, gpu_memory_gb=24)
    own["resources"]["stages"]["consistency"] = {"workers": 4}
    refusal = assert_the_remedy_fits("8B", own, "router.packs_per_step=2")
    assert "resources.stages.consistency.workers: " in refusal and "resources.workers" not in refusal


def test_a_smaller_pack_still_takes_every_sample():
    """A sample of shard.max_tokens tokens, all of them tiles, fits into it; or the samples become shorter."""
    content = slurm(workers=16, gpu_memory_gb=20)
    refusal = assert_the_remedy_fits("8B", content, "shard.max_tokens=8000")
    tokens, tiles = (
        int(refusal.partition(f"consistency.{name}: ")[2].partition(",")[0])
        for name in ("reference_tokens_per_pack", "tiles_per_pack")
    )
    assert "shard.max_tokens" not in refusal and tokens >= 8000 and tiles >= 8000 // 256


def test_a_pack_has_no_more_tiles_than_its_tokens():
    site = load_site(ROOT / "sites" / "slurm.yaml")
    few = ("consistency.reference_tokens_per_pack=8192", "consistency.tiles_per_pack=32")
    many = ("consistency.reference_tokens_per_pack=8192", "consistency.tiles_per_pack=96")
    assert planned("8B", site, *many).memory == planned("8B", site, *few).memory


def test_a_local_folder_without_weights_is_planned_by_its_config(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    config = tmp_path / "pipeline.yaml"
    config.write_text(f"inputs: {{records: {{format: demo, num_samples: 20}}, model: {model}}}\n")
    request = RunRequest(config=config, site=Site(name="test", storage=tmp_path / "store"))
    plan = plan_without_weights(request, pipeline_graph())
    assert "copy them into the folder" in plan.note and plan.estimates["consistency"].training


def test_a_model_with_weights_is_planned_as_usual(tmp_path):
    config = tmp_path / "pipeline.yaml"
    model = make_tiny_model(tmp_path / "model")
    config.write_text(f"inputs: {{records: {{format: demo, num_samples: 20}}, model: {model}}}\n")
    request = RunRequest(config=config, site=Site(name="test", storage=tmp_path / "store"))
    assert plan_without_weights(request, pipeline_graph()) is None


def test_a_plan_needs_no_torch_and_exits_with_2_if_refused(capsys, tmp_path):
    import subprocess

    code = (
        "import sys; from pipeline.cli import main\n"
        "try: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "plan", str(CONFIGS / "internvl3_5-30b-a3b.yaml")]
    command += ["--site", str(ROOT / "sites" / "slurm.yaml"), "--storage", str(tmp_path / "store")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=PATIENCE_S)
    assert ended.returncode == 2
    assert "refused" in ended.stdout and "set train.memory.zero_stage: 3" in ended.stderr
    assert ended.stderr.strip().endswith("False")
    assert not (tmp_path / "store").exists()


def test_the_speed_counts_the_flops_of_a_step():
    """Those of docs/measurements/cuda.md: 48 tiles in 6 samples with 128 tokens of text."""
    sizes = model_sizes(model_config(PUBLISHED / "OpenGVLab" / "InternVL3_5-1B"))
    work = PackWork(48, 6 * (4 * 320 + 128), 6 * (8 * 256 + 128), train_vision=True, checkpointing="none")
    assert pack_flops(sizes, work) == pytest.approx(181.5e12, rel=0.05)


@pytest.mark.parametrize("size", PUBLISHED_PARAMETERS)
def test_the_smallest_setup_of_the_page_is_no_smaller_than_what_fits(size):
    sizes = model_sizes(model_config(PUBLISHED / "OpenGVLab" / f"InternVL3_5-{size}"))
    setup = smallest_setup(sizes)
    assert setup.memory.device <= 0.9 * 80e9
