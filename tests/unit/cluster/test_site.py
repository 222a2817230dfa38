"""Site files: what stands in the repository, and what a user is told about a wrong one."""

from pathlib import Path

import pytest

from cluster.site import Site
from cluster.site_files import SITES_FOLDER, load_site
from vico.errors import UserError


@pytest.fixture
def site_file(tmp_path, monkeypatch):
    """Writes a site file and loads it."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, **options):
        path = tmp_path / "here.yaml"
        path.write_text(text)
        return load_site(path, **options)

    return load


def test_local_site_file_shows_the_defaults():
    """An installed package has no sites folder; it must behave as the file that the checkout shows."""
    shown = load_site(SITES_FOLDER / "local.yaml")
    assert shown.model_copy(update={"storage": Path("runs")}) == Site()


def test_every_field_stands_in_the_local_site_file():
    import yaml

    written = yaml.safe_load((SITES_FOLDER / "local.yaml").read_text())
    fields = {
        name: set(getattr(part, "model_fields", {})) if hasattr(part, "model_fields") else None
        for name, part in ((name, type(getattr(Site(), name))) for name in Site.model_fields)
    }
    assert {
        name: set(value) if isinstance(value, dict) else None for name, value in written.items()
    } == fields


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
        ("resources: {worker: 1}", "resources.worker is not a field of a site; did you mean workers?"),
        ("resources: {x: 1}", "known here: workers, actors"),
        ("resources: {workers: two}", "resources.workers='two': input should be a valid integer"),
        ("resources: {workers: 0}", "resources.workers=0: input should be greater than or equal to 1"),
        ("train: {zero_stage: 4}", "train.zero_stage=4: input should be 1, 2 or 3"),
        ("resources: {workers: 4}", "resources.workers=4 .* needs 4 CPUs, more than ray.num_cpus=2; lower"),
        ("resources: {threads_per_worker: 2}", "threads_per_worker=2 needs 4 CPUs"),
        ("ray: {dashboard_port: 8265}", "ray.dashboard_port=8265 has no effect while ray.dashboard is false"),
        (
            "train: {trace_steps: [3, 2]}",
            r"train.trace_steps=\[3, 2\] is no range of updates; give",
        ),
        ("train: {peak_tflops: 0}", "train.peak_tflops=0: input should be greater than 0"),
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


def test_a_joined_cluster_may_be_larger_than_this_machine(site_file):
    assert site_file("ray: {address: auto}\nresources: {workers: 64}").resources.workers == 64
    assert site_file("jobs: {address: 'http://host'}\nresources: {workers: 64}").resources.workers == 64


def test_an_object_store_has_a_working_copy_and_goes_along_as_it_was_given(tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text(
        f"storage: s3://bucket/prefix/\nwork: {tmp_path}/work\ntracking: {{uri: 'http://mlflow:5000'}}\n"
    )
    site = load_site(str(path))
    assert site.remote == site.storage_address == "s3://bucket/prefix"
    assert site.storage.parent == tmp_path / "work"
    given = site.as_given()
    assert given["storage"] == "s3://bucket/prefix" and "remote" not in given
    assert Site.model_validate(given) == site
    other = load_site(str(path), storage="s3://bucket/other")
    assert other.storage.parent == site.storage.parent and other.storage != site.storage


@pytest.mark.parametrize(
    "text, message",
    [
        ("storage: gs://bucket/prefix", "is no folder and no s3://bucket/prefix"),
        ("storage: s3:///prefix", "is no folder and no s3://bucket/prefix"),
        ("storage: runs\nwork: /scratch", "work=/scratch has no effect while storage is a folder"),
        ("storage: s3://bucket/prefix", "tracking.uri is not set, and a database cannot lie in"),
    ],
)
def test_a_storage_that_cannot_work_is_one_line(tmp_path, text, message):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_site(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)
