"""Site files: the one in the repository, and the message about a wrong one."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.site import Site
from cluster.site_files import SITES_FOLDER, load_site
from vico.errors import UserError


def test_local_site_file_shows_the_defaults():
    """An installed package has no sites folder; it must behave as the file that the checkout shows."""
    shown = load_site(SITES_FOLDER / "local.yaml")
    assert shown.model_copy(update={"storage": Path("runs")}) == Site()


def field_names(content: dict[str, Any]) -> dict[str, Any]:
    """Return the nested names of a site's fields, without their values."""
    return {name: field_names(value) if isinstance(value, dict) else None for name, value in content.items()}


def test_the_site_files_show_every_field():
    """Blocks of one kind are in the file of that kind."""
    fields = field_names(Site().model_dump(mode="json"))
    own_blocks = {kind: fields.pop(kind) for kind in ("kuberay", "slurm")}
    assert field_names(yaml.safe_load((SITES_FOLDER / "local.yaml").read_text())) == fields
    for kind, block in own_blocks.items():
        written = yaml.safe_load((SITES_FOLDER / f"{kind}.yaml").read_text())
        assert set(written[kind]) == set(block)


@pytest.mark.parametrize("path", sorted(SITES_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_site_is_valid_and_is_what_its_job_reads(path):
    site = load_site(path)
    assert site.name == path.stem
    in_job = Site.model_validate(site.in_job().as_given())
    assert in_job.resources == site.resources
    assert in_job.kind == ("local" if site.kind == "local" else "ray")


def test_storage_is_absolute_and_overridable(site_file, tmp_path):
    assert site_file("storage: here").storage == tmp_path / "here"
    assert site_file("storage: here", storage="there").storage == tmp_path / "there"
    assert load_site(None).storage == tmp_path / "runs"


def test_site_by_name_prefers_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "lab.yaml").write_text("name: lab\nray: {address: auto}")
    assert load_site("lab").name == "lab"
    with pytest.raises(UserError, match=r"--site lap: there is no sites/lap.yaml; .*lab, local"):
        load_site("lap")
    with pytest.raises(UserError, match="no such file"):
        load_site("sites/lap.yaml")


def test_tracking_uri_defaults_to_sqlite_in_the_storage_folder(site_file, tmp_path):
    assert site_file("storage: a").tracking_uri == f"sqlite:///{tmp_path}/a/mlflow.db"
    assert site_file("tracking: {uri: 'http://host:5000'}").tracking_uri == "http://host:5000"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resorces: {}", "resorces is not a field of a site; did you mean resources?"),
        (
            "resources: {stages: {shard: {task: 1}}}",
            "stages.shard.task is not a field of a site; did you mean tasks?",
        ),
        (
            "nodes: [{name: a, count: 1, cpus: 2, gpu: 1}]",
            "nodes.0.gpu is not a field of a site; did you mean gpus?",
        ),
        ("environment: {HF_TOKEN: x}", "HF_TOKEN is a secret by its name"),
        ("environment: {MY_DB_PASSWORD: x}", "MY_DB_PASSWORD is a secret by its name"),
        ("resources: {worker: 1}", "resources.worker is not a field of a site; did you mean workers?"),
        ("resources: {x: 1}", "known here: workers, actors"),
        ("quality: 1", "known here: name, .*, hook; keys of stages belong in the pipeline file"),
        ("nodes: [{name: a}]", r"nodes\.0\.cpus is missing; add it to the site file"),
        ("environment: {A: 1}", "environment.A is not a text in YAML; put it in quotes"),
        ("environment: {A B: x}", "environment: 'A B' is not the name of a variable; use letters"),
        ('environment: {A: "x\\0"}', "environment.A has a line break or a control character"),
        ("environment: {RAY_ADDRESS: x}", "environment.RAY_ADDRESS would have no effect with kind: local"),
        ("environment: {PYTHONUNBUFFERED: '0'}", "environment.PYTHONUNBUFFERED would have no effect"),
        ('name: "a\\nb"', r"name='a\\nb' has a line break"),
        ("storage: ''", "storage='' is empty; give a folder"),
        ("storage: 5", "storage=5 is not a path; write a text"),
        ("jobs: {address: ''}", "jobs.address='' is empty; give a value, or leave jobs.address out"),
        ("resources: {workers: two}", "resources.workers='two': input should be a valid integer"),
        ("resources: {workers: yes}", "resources.workers=True: input should be a number, not true or false"),
        ("resources: {gpu_memory_gb: true}", "gpu_memory_gb=True: input should be a number, not true"),
        ("nodes: [{name: a, cpus: true}]", r"nodes\.0\.cpus=True: input should be a number, not true"),
        ("train: {memory: {zero_stage: true}}", "memory.zero_stage=True: input should be a number"),
        ("resources: {workers: 0}", "resources.workers=0: input should be greater than or equal to 1"),
        ("train: {memory: {zero_stage: 4}}", "train.memory.zero_stage=4: input should be 1, 2 or 3"),
        ("resources: {workers: 4}", "resources.workers=4 .* needs 4 CPUs, more than ray.num_cpus=2; lower"),
        ("resources: {threads_per_worker: 2}", "threads_per_worker=2 needs 4 CPUs"),
        ("ray: {dashboard_port: 8265}", "ray.dashboard_port=8265 has no effect while ray.dashboard is false"),
        (
            "train: {profiling: {trace_steps: [3, 2]}}",
            r"train.profiling.trace_steps=\[3, 2\] is not a range of updates; give",
        ),
        (
            "train: {profiling: {peak_tflops: 0}}",
            "train.profiling.peak_tflops=0: input should be greater than 0",
        ),
        ("- a", "holds a list; a site file is a block of keys"),
        ("a: [", "fix the YAML there"),
        ("train: {restarts: {hang_timeout_s: 1:30}}", "hang_timeout_s='1:30': input should be"),
        ("ray: 3", "ray=3: input should be a valid dictionary"),
    ],
)
def test_wrong_site_gives_one_line_with_field_and_remedy(site_file, text, message):
    with pytest.raises(UserError, match=message) as error:
        site_file(text)
    assert "\n" not in str(error.value)
    assert "here.yaml" in str(error.value)


def test_all_faults_of_a_site_are_reported_together(site_file, tmp_path):
    with pytest.raises(UserError) as error:
        site_file("owner: here\nresources: {workers: -4, actor: 4, gpus_per_worker: x}\nray: {num_cpus: 0}")
    lines = str(error.value).splitlines()
    fields = {re.match(rf"{tmp_path}/here.yaml: ([\w.]+)", line)[1] for line in lines}
    assert fields == {
        "owner",
        "ray.num_cpus",
        "resources.actor",
        "resources.gpus_per_worker",
        "resources.workers",
    }
    assert len(lines) == len(fields)


@pytest.mark.parametrize(
    ("block", "name"),
    [
        ("memory", "zero_stage"),
        ("restarts", "max_failures"),
        ("divergence", "max_loss_spikes"),
        ("profiling", "trace_steps"),
    ],
)
def test_a_train_setting_outside_its_block_is_refused_with_its_path(site_file, block, name):
    message = rf"train\.{name} is not a field of a site; did you mean train\.{block}\.{name}\?$"
    with pytest.raises(UserError, match=message):
        site_file(f"train: {{{name}: 1}}")


@pytest.mark.parametrize("name", ["keep_checkpoints", "checkpoint_every_steps"])
def test_a_name_like_that_of_a_block_is_refused_with_the_fields_of_the_block(site_file, name):
    message = (
        rf"train\.{name} is not a field .*; did you mean checkpoints \(with every_steps, every_s, keep\)\?$"
    )
    with pytest.raises(UserError, match=message):
        site_file(f"train: {{{name}: 3}}")


def test_a_joined_cluster_may_be_larger_than_this_machine(site_file):
    assert site_file("ray: {address: auto}\nresources: {workers: 64}").resources.workers == 64
    assert site_file("jobs: {address: 'http://host'}\nresources: {workers: 64}").resources.workers == 64


def test_an_object_store_has_a_working_copy_and_is_passed_on_by_its_address(tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text(
        f"storage: s3://bucket/prefix/\nwork: {tmp_path}/work\ntracking: {{uri: 'http://mlflow:5000'}}\n"
    )
    site = load_site(str(path))
    assert site.remote == site.storage_address == "s3://bucket/prefix"
    assert site.storage.parent == tmp_path / "work"
    settings = site.as_given()
    assert settings["storage"] == "s3://bucket/prefix" and "remote" not in settings
    assert Site.model_validate(settings) == site
    other = load_site(str(path), storage="s3://bucket/other")
    assert other.storage.parent == site.storage.parent and other.storage != site.storage


@pytest.mark.parametrize(
    "text, message",
    [
        ("storage: gs://bucket/prefix", "is neither a folder nor s3://bucket/prefix"),
        ("storage: s3:///prefix", "is neither a folder nor s3://bucket/prefix"),
        ("storage: runs\nwork: /scratch", "work=/scratch has no effect while storage is a folder"),
        (
            "storage: s3://bucket/prefix",
            "tracking.uri is not set, and storage=s3://bucket/prefix cannot hold a database",
        ),
    ],
)
def test_a_storage_that_cannot_work_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_site(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, line", [("storage: a\nname: b\nstorage: c\n", 3), ("ray: {temp_dir: a, temp_dir: b}\n", 1)]
)
def test_a_key_that_appears_twice_is_refused(site_file, text, line):
    with pytest.raises(UserError, match=rf"here\.yaml, line {line}: the key '\w+' appears twice"):
        site_file(text)


def test_numbers_of_a_site_are_decimal(site_file):
    assert site_file("train: {checkpoints: {every_steps: 0100}}").train.checkpoints.every_steps == 100


def test_all_paths_of_a_site_are_absolute(site_file, tmp_path):
    """A job has another working directory."""
    site = site_file(
        "storage: s3://b/p\nwork: work\nhook: {command: [./tell.sh, x]}\n"
        "tracking: {uri: 'sqlite:///a b/m.db?timeout=9', artifacts: art}"
    )
    assert site.work == tmp_path / "work" and site.storage.is_relative_to(tmp_path / "work")
    assert site.hook.command == [str(tmp_path / "tell.sh"), "x"]
    assert site.tracking.uri == f"sqlite:///{tmp_path}/a b/m.db?timeout=9"
    assert site.tracking.artifacts == str(tmp_path / "art")
    same = site_file(
        "tracking: {uri: 'http://h:5000', artifacts: 'mlflow-artifacts:/x'}\nhook: {command: [tell]}"
    )
    assert (same.tracking.uri, same.tracking.artifacts) == ("http://h:5000", "mlflow-artifacts:/x")
    assert same.hook.command == ["tell"]
    with pytest.raises(UserError, match="work=5 is not a path"):
        site_file("storage: s3://b/p\nwork: 5\ntracking: {enabled: false}")


def test_a_stage_without_ranks_does_not_need_room_for_them(site_file):
    groups = "[{name: gpu, count: 8, cpus: 64, gpus: 8}, {name: cpu, count: 1, cpus: 32}]"
    nodes = f"kind: ray\nray: {{address: 'a:1'}}\nnodes: {groups}\n"
    shard = "shard: {tasks: 32, gpus_per_worker: 0, nodes: cpu"
    text = nodes + "resources: {workers: 64, gpus_per_worker: 1, nodes: gpu, stages: {%s}}}"
    assert site_file(text % shard).resources.of_stage("shard").tasks == 32
    with pytest.raises(UserError, match=r"stages\.shard\.workers=64"):
        site_file(text % f"{shard}, workers: 64")
    with pytest.raises(UserError, match=r"stages\.router\.workers=64"):
        site_file(text % shard.replace("shard", "router"))
