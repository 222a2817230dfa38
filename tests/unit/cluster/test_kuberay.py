"""RayJobs through the official client: submit, status with reasons, logs, cancel, and every refusal."""

import base64
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.launchers.by_kind import launcher_of, launcher_of_submission
from cluster.launchers.kuberay import KubeRayJobs
from cluster.launchers.kuberay_config import JOB_MOUNT
from cluster.launchers.launcher import Job
from cluster.launchers.rayjob import ray_job
from cluster.site import Site
from cluster.site_files import SITES_FOLDER, load_site
from tests.kubernetes.api_server import FORBIDDEN, Cluster, check_ray_job, kubernetes_cluster
from tests.kubernetes.operator import Operator
from vico.errors import UserError

JOB = Job("vico-20260101-000000-abcd-0000", ("run", "c.yaml"), {"c.yaml": "seed: 0\n"}, {"id": "x"})


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Iterator[Cluster]:
    with kubernetes_cluster(tmp_path) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield cluster


@pytest.fixture
def operator(cluster, tmp_path) -> Operator:
    return Operator(tmp_path / "kubeconfig")


@pytest.fixture
def site(tmp_path) -> Callable[..., Site]:
    """Return a function that makes a site with these settings of its `kuberay` block."""

    def make(**kuberay: Any) -> Site:
        settings = yaml.safe_load((SITES_FOLDER / "kuberay.yaml").read_text())
        settings["storage"] = str(tmp_path / "runs")
        settings["kuberay"] |= {"work": None, **kuberay}
        return Site.model_validate(settings)

    return make


def test_a_job_is_submitted_followed_and_cancelled(cluster, operator, site):
    jobs = launcher_of(site())
    jobs.check()
    assert jobs.submit(JOB) == f"as RayJob vico/{JOB.name}"
    submission = {"kind": "kuberay", **jobs.place(), "id": JOB.name}
    assert submission["namespace"] == "vico"
    assert submission["context"] == "test", "not whichever is the current one later"
    later = launcher_of_submission(submission)
    assert later.status(JOB.name) == ("pending", "KubeRay's operator has not seen it yet")

    job = operator.job(JOB.name)
    operator.set_status(JOB.name, jobDeploymentStatus="Initializing")
    worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]["template"]
    pod = operator.make_pod(job, "worker-1", worker)
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    operator.set_pod_status(pod, conditions=[condition])
    assert later.status(JOB.name) == ("pending", f"Initializing; Unschedulable: {message}")

    waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
    container = {"name": "ray-worker", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
    operator.set_pod_status(
        pod, conditions=[], containerStatuses=[{**container, "state": {"waiting": waiting}}]
    )
    assert later.status(JOB.name).message == "Initializing; ImagePullBackOff: Back-off pulling image"

    operator.set_status(JOB.name, jobDeploymentStatus="Running", jobStatus="RUNNING")
    assert later.status(JOB.name).state == "running"
    submitter = operator.make_pod(job, "abcde", worker, **{"job-name": JOB.name})
    cluster.logs[submitter] = "Job submitted"
    assert later.logs(JOB.name) == "Job submitted"
    mesh = {**worker, "spec": {"containers": [{"name": "mesh", "image": "i"}, *worker["spec"]["containers"]]}}
    mesh["spec"]["containers"][1] = {"name": "ray-job-submitter", "image": "i"}
    beside_others = operator.make_pod(job, "zzzzz", mesh, **{"job-name": JOB.name})
    cluster.logs[beside_others] = "submitted beside others"
    assert later.logs(JOB.name) == "submitted beside others"

    operator.set_status(JOB.name, jobDeploymentStatus="Retrying", failed=1)
    assert later.status(JOB.name).message.startswith("Retrying; 1 of 3 attempts failed")
    assert later.cancel(JOB.name) is True
    assert [cluster.list("vico", plural) for plural in ("rayjobs", "configmaps", "pods")] == [[], [], []]
    status = later.status(JOB.name)
    assert (status.state, status.message) == ("unknown", f"there is no RayJob vico/{JOB.name} any more")
    assert later.cancel(JOB.name) is False


@pytest.mark.parametrize(
    "status, expected",
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, ("done", "")),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, ("cancelled", "")),
        (
            {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "took too long"},
            ("failed", "DeadlineExceeded: took too long"),
        ),
        (
            {"jobDeploymentStatus": "Failed", "jobStatus": "SUCCEEDED", "reason": "SubmissionFailed"},
            ("failed", "SubmissionFailed"),
        ),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "bad"}, ("failed", "bad")),
    ],
)
def test_ends_of_a_job_have_kuberays_reason(cluster, operator, site, status, expected):
    jobs = launcher_of(site())
    jobs.submit(JOB)
    operator.set_status(JOB.name, **status)
    assert jobs.status(JOB.name) == expected


def test_a_job_for_kueue_is_suspended_and_says_for_which_queue(cluster, operator, site):
    jobs = launcher_of(site(queue="training"))
    jobs.submit(JOB)
    job = operator.job(JOB.name)
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    operator.set_status(JOB.name, jobDeploymentStatus="Suspended")
    assert jobs.status(JOB.name).message == "Suspended; suspended, waits for Kueue's queue training"


def test_the_package_is_mounted_where_the_runtime_environment_looks(cluster, site):
    launcher_of(site()).submit(JOB)
    job = cluster.read("vico", "rayjobs", JOB.name)
    runtime_env = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert runtime_env["working_dir"] == f"file://{JOB_MOUNT}/package.zip"
    files = cluster.read("vico", "configmaps", JOB.name)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(files["binaryData"]["package.zip"]))) as archive:
        assert {"pipeline/cli.py", "c.yaml"} <= set(archive.namelist())
    for group in (
        job["spec"]["rayClusterSpec"]["headGroupSpec"],
        *job["spec"]["rayClusterSpec"]["workerGroupSpecs"],
    ):
        spec = group["template"]["spec"]
        assert {"name": "job", "configMap": {"name": JOB.name}} in spec["volumes"]
        (container,) = spec["containers"]
        assert {"name": "job", "mountPath": JOB_MOUNT, "readOnly": True} in container["volumeMounts"]
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert container["envFrom"] == [{"secretRef": {"name": "s3-credentials"}}]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert files["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]


@pytest.mark.parametrize(
    "kuberay",
    [
        {},
        {"submission_mode": "SidecarMode", "queue": "q", "managed_by": "kueue.x-k8s.io/multikueue"},
        {
            "submission_mode": "HTTPMode",
            "shutdown_after_finish": False,
            "deletion_rules": [
                {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}}
            ],
        },
        {
            "active_deadline_s": 60,
            "pre_running_deadline_s": 30,
            "ttl_after_finish_s": 10,
            "service_account": "vico",
            "image_pull_secrets": ["registry"],
            "labels": {"team": "vision"},
            "annotations": {"note": "x"},
            "volumes": [{"claim": "data", "path": "/data", "read_only": True}],
            "head": {"cpus": 2, "memory_gib": 1.5, "tolerations": [{"key": "head", "operator": "Exists"}]},
            "token_authentication": False,
        },
    ],
)
def test_every_manifest_is_valid_by_kuberays_schema(site, kuberay):
    manifest = ray_job(JOB, site(**kuberay))
    check_ray_job(manifest, strict=True)
    spec = manifest["spec"]
    assert ("submitterConfig" in spec) == (spec["submissionMode"] == "K8sJobMode")
    assert spec["backoffLimit"] == 2


@pytest.mark.parametrize(
    "kuberay, message",
    [
        (
            {"tolerations_of_head": []},
            "kuberay.tolerations_of_head",
        ),
        ({"deletion_rules": [{"policy": "DeleteSelf"}]}, "exclude each other"),
        ({"queue": "q", "shutdown_after_finish": False}, "KubeRay suspends none"),
        ({"submission_mode": "SidecarMode", "submitter_backoff_limit": 3}, "has no effect with"),
        ({"submission_mode": "InteractiveMode"}, "kuberay.submission_mode"),
        ({"image": ""}, "kuberay.image='' is empty"),
        ({"image": "my image"}, "kuberay.image='my image' has a space"),
        ({"ray_version": "latest"}, "kuberay.ray_version='latest' is not a version"),
        ({"namespace": "My_NS"}, "kuberay.namespace='My_NS' is not a name of Kubernetes"),
        ({"namespace": "a.b"}, "kuberay.namespace='a.b' is not a name of Kubernetes"),
        ({"secrets": ["S3_Keys"]}, "kuberay.secrets='S3_Keys' is not a name of Kubernetes"),
        ({"service_account": "a b"}, "kuberay.service_account='a b' is not"),
        ({"image_pull_secrets": ["x" * 254]}, "at most 253 characters"),
        ({"volumes": [{"claim": "A", "path": "/x"}]}, "kuberay.volumes.claim='A' is not"),
        ({"volumes": [{"claim": "a", "path": "x"}]}, "kuberay.volumes.path=x is not an absolute path"),
        ({"volumes": [{"claim": "a", "path": "/dev/shm/"}]}, "has another volume already"),
        ({"volumes": [{"claim": "a", "path": "/x"}, {"claim": "b", "path": "/x/"}]}, "has another volume"),
        ({"labels": {"vico-job": "x"}}, "kuberay.labels.vico-job=x is set by vico; leave it out"),
        ({"labels": {"kueue.x-k8s.io/queue-name": "q"}}, "is set by vico; set kuberay.queue"),
        ({"labels": {"team": "a b"}}, "kuberay.labels.team='a b' is not a value of a label"),
        ({"labels": {"a b": "x"}}, "kuberay.labels: 'a b' is not a key of Kubernetes"),
        ({"annotations": {"a b": "x"}}, "kuberay.annotations: 'a b' is not a key"),
        ({"head": {"selector": {"pool": "x" * 64}}}, "is not a value of a label"),
        ({"queue": "My Queue"}, "kuberay.queue='My Queue' is not a value of a label"),
        ({"backoff_limit": 1 << 31}, "kuberay.backoff_limit=2147483648: input should be less than or equal"),
    ],
)
def test_settings_that_kuberay_would_refuse_are_refused_in_the_site(tmp_path, kuberay, message):
    settings = yaml.safe_load((SITES_FOLDER / "kuberay.yaml").read_text())
    settings["kuberay"] |= kuberay
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_site(path)
    assert "\n" not in str(error.value)


def test_a_selector_that_kubernetes_refuses_is_refused_in_the_site(site):
    settings = site().model_dump()
    settings["nodes"][1]["selector"] = {"nvidia.com/gpu.product": "H100 80GB"}
    with pytest.raises(ValueError, match=r"nodes: selector of group gpu\.nvidia.*='H100 80GB' is not"):
        Site.model_validate(settings)


def test_an_invalid_manifest_is_refused_by_the_server_and_leaves_nothing(cluster, site):
    tolerations = [{"key": "gpu", "operators": "Exists"}]
    jobs = launcher_of(site(head={"tolerations": tolerations}))
    with pytest.raises(
        UserError, match=r'refuses the manifest \(.*unknown field .*operators".*correct the kub'
    ):
        jobs.submit(JOB)
    assert cluster.num_changes == 0


@pytest.mark.parametrize(
    "context, namespace, message",
    [
        ("gone", None, "does not answer"),
        ("stranger", None, "refuses our credentials"),
        (None, FORBIDDEN, f"not allowed in namespace {FORBIDDEN}"),
        ("nowhere", None, "kuberay.context=nowhere"),
    ],
)
def test_a_cluster_that_refuses_us_is_named_before_anything_is_submitted(
    cluster, site, context, namespace, message
):
    with pytest.raises(UserError, match=message) as error:
        launcher_of(site(context=context, namespace=namespace)).check()
    assert "\n" not in str(error.value)
    assert cluster.num_changes == 0


def test_without_a_kubeconfig_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(UserError, match="set KUBECONFIG"):
        KubeRayJobs(None, None).check()


def test_an_interrupted_submission_leaves_nothing(cluster, site, monkeypatch):
    """Ctrl-C between the config map and the RayJob."""
    jobs = launcher_of(site())
    monkeypatch.setattr(KubeRayJobs, "_own", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        jobs.submit(JOB)
    assert [cluster.list("vico", plural) for plural in ("rayjobs", "configmaps")] == [[], []]


def test_a_site_without_an_image_is_refused(site):
    with pytest.raises(UserError, match=r"kuberay\.image is not set in site kuberay"):
        launcher_of(site(image=None)).render(JOB)


def test_the_manifest_file_can_be_read_by_kubectl(site):
    """The text of --print starts with a YAML document."""
    text = launcher_of(site()).render(JOB).split("\n\n# ConfigMap")[0]
    assert yaml.safe_load(text)["kind"] == "RayJob"
    assert Path(JOB_MOUNT).is_absolute()


def test_an_object_store_needs_a_working_copy_that_all_pods_see():
    settings = yaml.safe_load((SITES_FOLDER / "kuberay.yaml").read_text())
    in_job = Site.model_validate(settings).in_job()
    assert in_job.as_given() | {"work": "/work/vico", "storage": "s3://my-bucket/vico"} == in_job.as_given()
    assert Site.model_validate(settings).work is None, "the submitting machine has its own"
    for work, message in (
        (None, "kuberay.work is not set"),
        ("/other", "kuberay.work=/other is not on a volume"),
    ):
        settings["kuberay"]["work"] = work
        with pytest.raises(ValueError, match=message):
            Site.model_validate(settings)
