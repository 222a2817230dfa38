"""Sites of each kind: settings without effect, nodes that do not fit, and what a scheduler would misread."""

import pytest

from vico.errors import UserError

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
        (f'kind: slurm\n{GROUP}\nstorage: "/a\\nb"', "storage='/a\\nb' has a line break"),
        ("kind: laptop", "kind='laptop'"),
        (
            f"kind: slurm\n{GROUP}\nslurm: {{time_limit: 720}}",
            "slurm.time_limit=720 is a number, which Slurm takes for minutes",
        ),
        (
            f"kind: slurm\n{GROUP}\nslurm: {{time_limit: '1:2:3:4'}}",
            "slurm.time_limit='1:2:3:4' is not a time of Slurm",
        ),
        (
            f"kind: slurm\n{GROUP}\nslurm: {{time_limit: '6'}}",
            "slurm.time_limit=6 ends before a run can work",
        ),
        (
            f"kind: slurm\n{GROUP}\nslurm: {{stop_before_end_s: 70000}}",
            "slurm.stop_before_end_s=70000: input should be le",
        ),
        (
            f"kind: slurm\n{GROUP}\nslurm: {{partition: 'gpu two'}}",
            "slurm.partition='gpu two' is not a name of Slurm",
        ),
        (f'kind: slurm\n{GROUP}\nslurm: {{qos: "a\\nrm x"}}', "slurm.qos='a\\nrm x' is not a name of Slurm"),
        (
            f'kind: slurm\n{GROUP}\nslurm: {{options: ["--comment=a\\nrm x"]}}',
            "slurm.options.0='--comment=a\\nrm x' has a line",
        ),
        (
            f"kind: slurm\n{GROUP}\nslurm: {{options: [--job-name=x]}}",
            "'--job-name=x' is set by vico; leave it out (jobs have",
        ),
        (
            f"kind: slurm\n{GROUP}\nslurm: {{options: [-t 5]}}",
            "'-t 5' is set by vico; leave it out (set slurm.time_limit)",
        ),
        (f"kind: slurm\n{GROUP}\nslurm: {{folder: jobs}}", "slurm.folder=jobs is not an absolute path"),
        (
            f"kind: slurm\n{GROUP}\nslurm: {{node_folder: /a/folder/with/a/long/path}}",
            "too long for Ray's sockets; give one of at m",
        ),
        (
            f"kind: slurm\n{GROUP}\nenvironment: {{RAY_TMPDIR: /x}}",
            "environment.RAY_TMPDIR would have no effect with kind: slurm: set slurm.node",
        ),
        ("kind: slurm\nnodes: [{name: Gpu, cpus: 8}]", "nodes: name='Gpu' is not a name of a group; use"),
        (
            "kind: slurm\nnodes: [{name: g, cpus: 8, memory_gib: 0.001}]",
            "nodes.0.memory_gib=0.001: input should be",
        ),
        (
            "kind: ray\nresources: {gpus_per_worker: 1.5}",
            "resources.gpus_per_worker=1.5 cannot be reserved in Ray",
        ),
        (
            "kind: ray\nresources: {stages: {ratio: {gpus_per_worker: 2.5}}}",
            "resources.stages.ratio.gpus_per_worker=2.5 cannot be reserved",
        ),
        (
            "kind: ray\njobs: {driver: {custom: {CPU: 1}}}",
            "jobs.driver.custom.CPU=1 is one of Ray's own resources; set jobs.dr",
        ),
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
    [
        ("90", 5400),
        ("7:30", 450),
        ("12:00:00", 43200),
        ("2-00", 172800),
        ("1-12:30", 131400),
        ("1-0:0:5", 86405),
    ],
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
