"""Site files: the one in the repository, and the message about a wrong one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.site import Site
from cluster.site_files import SITES_FOLDER, load_site
from vico.errors import UserError


@pytest.fixture
def site_file(tmp_path, monkeypatch) -> Callable[..., Site]:
    """Return a function that writes a site file and loads it."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, **options: str) -> Site:
        path = tmp_path / "here.yaml"
        path.write_text(text)
        return load_site(path, **options)

    return load


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
        ("environment: {A: 1}", "environment.A=1 is no text in YAML; put it in quotes"),
        ("environment: {A B: x}", "environment: 'A B' is not the name of a variable; use letters"),
        ('environment: {A: "x\\0"}', "environment.A='x.*' has a line break or a control character"),
        ("environment: {RAY_ADDRESS: x}", "environment.RAY_ADDRESS would have no effect with kind: local"),
        ("environment: {PYTHONUNBUFFERED: '0'}", "environment.PYTHONUNBUFFERED would have no effect"),
        ('name: "a\\nb"', r"name='a\\nb' has a line break"),
        ('storage: "/a\\nb"', r"storage='/a\\nb' has a line break"),
        ("storage: ''", "storage='' is empty; give a folder"),
        ("storage: 5", "storage=5 is not a path; write a text"),
        ("jobs: {address: ''}", "jobs.address='' is empty; give a value, or leave jobs.address out"),
        ("resources: {workers: two}", "resources.workers='two': input should be a valid integer"),
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
        ("- a", "holds a list; a site file holds fields"),
        ("a: [", "is not YAML"),
        ("ray: 3", "ray=3: input should be a valid dictionary"),
    ],
)
def test_wrong_site_gives_one_line_with_field_and_remedy(site_file, text, message):
    with pytest.raises(UserError, match=message) as error:
        site_file(text)
    assert "\n" not in str(error.value)
    assert "here.yaml" in str(error.value)


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


GROUP = "nodes: [{name: gpu, count: 2, cpus: 8, gpus: 4, memory_gib: 64}]"


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "kind: local\nray: {address: auto}",
            "ray.address=auto has no effect with kind: local; set kind: ray",
        ),
        (
            "kind: slurm\njobs: {address: 'http://h:1'}",
            "jobs.address=http://h:1 has no effect with kind: slurm",
        ),
        ("slurm: {partition: gpu}", "slurm has no effect with kind: local; set kind: slurm"),
        ("kuberay: {image: i}", "kuberay has no effect with kind: local; set kind: kuberay"),
        ("kind: slurm", "nodes has 0 groups; a Slurm job takes nodes of one size"),
        ("kind: kuberay", "nodes is empty; list the worker groups"),
        ("kind: kuberay\nnodes: [{name: a, cpus: 4}]", "group a has no memory_gib"),
        (
            f"kind: slurm\n{GROUP}\nresources: {{gpus_per_worker: 8}}",
            "needs 1 CPUs and 8 GPUs, more than any",
        ),
        (f"kind: slurm\n{GROUP}\nresources: {{workers: 9, gpus_per_worker: 1}}", "which take 8; lower it"),
        (
            f"kind: slurm\n{GROUP}\nresources: {{stages: {{ratio: {{threads_per_worker: 9}}}}}}",
            "resources.stages.ratio.threads_per_worker=9",
        ),
        (
            f"kind: slurm\n{GROUP}\nresources: {{nodes: cpu}}",
            "resources.nodes=cpu is not a group in nodes; known",
        ),
        ("kind: slurm\nslurm: {start_on_node: [ssh]}\n" + GROUP, "names no node; write {host} in its place"),
        (
            "kind: slurm\nslurm: {options: [constraint=x]}\n" + GROUP,
            "'constraint=x' is not an option of sbatch",
        ),
        ("kind: slurm\nslurm: {time_limit: 12 hours}\n" + GROUP, "slurm.time_limit='12 hours'"),
        ("kind: laptop", "kind='laptop'"),
        (f"kind: slurm\n{GROUP}\nslurm: {{time_limit: 12:00:00}}", "slurm.time_limit=43200 is a number; write it in q"),
        (f"kind: slurm\n{GROUP}\nslurm: {{time_limit: '1:2:3:4'}}", "slurm.time_limit='1:2:3:4' is not a time of Slurm"),
        (f"kind: slurm\n{GROUP}\nslurm: {{time_limit: '6'}}", "slurm.time_limit=6 ends before a run can work"),
        (f"kind: slurm\n{GROUP}\nslurm: {{stop_before_end_s: 70000}}", "slurm.stop_before_end_s=70000: input should be le"),
        (f"kind: slurm\n{GROUP}\nslurm: {{partition: 'gpu two'}}", "slurm.partition='gpu two' is not a name of Slurm"),
        (f'kind: slurm\n{GROUP}\nslurm: {{qos: "a\\nrm x"}}', "slurm.qos='a\\nrm x' is not a name of Slurm"),
        (f'kind: slurm\n{GROUP}\nslurm: {{options: ["--comment=a\\nrm x"]}}', "slurm.options.0='--comment=a\\nrm x' has a line"),
        (f"kind: slurm\n{GROUP}\nslurm: {{options: [--job-name=x]}}", "'--job-name=x' is set by vico; leave it out (jobs have"),
        (f"kind: slurm\n{GROUP}\nslurm: {{options: [-t 5]}}", "'-t 5' is set by vico; leave it out (set slurm.time_limit)"),
        (f"kind: slurm\n{GROUP}\nslurm: {{folder: jobs}}", "slurm.folder=jobs is not an absolute path"),
        (f"kind: slurm\n{GROUP}\nslurm: {{node_folder: /a/folder/with/a/long/path}}", "too long for Ray's sockets; give one of at m"),
        (f"kind: slurm\n{GROUP}\nenvironment: {{RAY_TMPDIR: /x}}", "environment.RAY_TMPDIR would have no effect with kind: slurm: set slurm.node"),
        ("kind: slurm\nnodes: [{name: Gpu, cpus: 8}]", "nodes: name='Gpu' is not a name of a group; use"),
        ("kind: slurm\nnodes: [{name: g, cpus: 8, memory_gib: 0.001}]", "nodes.0.memory_gib=0.001: input should be"),
        ("kind: ray\nresources: {gpus_per_worker: 1.5}", "resources.gpus_per_worker=1.5 cannot be reserved in Ray"),
        (
            "kind: ray\nresources: {stages: {ratio: {gpus_per_worker: 2.5}}}",
            "resources.stages.ratio.gpus_per_worker=2.5 cannot be reserved",
        ),
        ("kind: ray\njobs: {driver: {custom: {CPU: 1}}}", "jobs.driver.custom.CPU=1 is not a resource of its own kind; set j"),
        ("kind: ray\njobs: {driver: {custom: {x: -1}}}", "jobs.driver.custom.x=-1 is not above 0"),
        ("kind: ray\njobs: {driver: {cpus: 1.5}}", "jobs.driver.cpus=1.5 cannot be reserved"),
        ("jobs: {driver: {cpus: 1}}", "jobs.driver has no effect with kind: local; set kind: ray"),
    ],
)
def test_settings_that_a_kind_ignores_and_nodes_that_do_not_fit_are_refused(site_file, text, message):
    with pytest.raises(UserError) as error:
        site_file(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "limit, seconds",
    [("90", 5400), ("7:30", 450), ("12:00:00", 43200), ("2-00", 172800), ("1-12:30", 131400), ("1-0:0:5", 86405)],
)
def test_a_time_limit_is_read_as_slurm_reads_it(site_file, limit, seconds):
    """It must leave time before the stop; Slurm may stop a minute early."""
    text = f"kind: slurm\n{GROUP}\nslurm: {{time_limit: '{limit}', stop_before_end_s: %d}}"
    assert site_file(text % min(seconds - 61, 65535)).slurm.time_limit == limit
    if seconds < 65535:
        with pytest.raises(UserError, match="ends before a run can work"):
            site_file(text % (seconds - 60))


def test_a_file_without_kind_has_the_one_of_its_addresses(site_file):
    assert site_file("storage: a").kind == "local"
    assert site_file("ray: {address: auto}").kind == "ray"
    assert site_file("jobs: {address: 'http://host:8265'}").kind == "ray"


def test_a_stage_has_its_own_resources(site_file):
    site = site_file(
        f"kind: slurm\n{GROUP}\nresources:\n  workers: 8\n  gpus_per_worker: 1\n  nodes: gpu\n"
        "  stages: {shard: {tasks: 16, gpus_per_worker: 0}, ratio: {actors: 16, gpus_per_worker: 0.5}}"
    )
    assert site.for_stage("shard").resources.per_process == {"CPU": 1, "vico_gpu": 0.001}
    assert site.for_stage("shard").resources.tasks == 16
    assert site.for_stage("ratio").resources.per_process == {"CPU": 1, "GPU": 0.5, "vico_gpu": 0.001}
    assert site.for_stage("router").resources.per_process == {"CPU": 1, "GPU": 1, "vico_gpu": 0.001}


@pytest.mark.parametrize(
    "text, line", [("storage: a\nname: b\nstorage: c\n", 3), ("ray: {temp_dir: a, temp_dir: b}\n", 1)]
)
def test_a_key_that_appears_twice_is_refused(site_file, text, line):
    with pytest.raises(UserError, match=rf"here\.yaml, line {line}: the key '\w+' appears twice"):
        site_file(text)
