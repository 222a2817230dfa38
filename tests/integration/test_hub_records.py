"""Records and shards at `hf://`: the Hub's own client against a server on loopback with its API."""

import uuid
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.utils._http
import numpy as np
import pytest
import yaml

from data_prep import remote_files as storage
from data_prep.records.config import RecordsConfig
from data_prep.records.identity import records_fingerprint
from data_prep.records.sets import record_sets
from data_prep.shards.cache import ShardCache
from data_prep.shards.index import load_index
from data_prep.shards.reader import SampleReader
from pipeline.identity.file_digests import DigestCache
from tests.hub_server import environment, hub_server
from tests.integration.demo_pipeline import finished, vico
from tests.record_tars import FORMATS, config_of, files_of, tars, write_good_formats
from tests.tiny_model import make_tiny_model
from vico.errors import Unreachable, UserError
from vico.prompt import load_prompt_format

ADDRESS = "hf://datasets/org/set/here"
REPOSITORY = "org/set"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    return write_good_formats(tmp_path_factory.mktemp("records"), 5, load_prompt_format(model))


@pytest.fixture
def hub(folder, monkeypatch):
    """Use the server for `hf://` in this process, where the client was imported with another HF_ENDPOINT."""
    with hub_server(REPOSITORY, files_of(folder, "here")) as hub:
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        path = template.removeprefix(huggingface_hub.constants.ENDPOINT)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + path)
        monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.01)
        # the client retries as usual, but without its pauses of seconds
        monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setenv("VICO_REMOTE_PATIENCE_S", "30")
        storage._filesystem_of.cache_clear()
        yield hub
        storage._filesystem_of.cache_clear()


FAULTS = {
    "none": lambda number: None,
    "503": lambda number: "503" if number % 7 == 3 else None,
    "stop": lambda number: "stop" if number % 3 == 1 else None,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("file", FORMATS)
def test_records_of_the_hub_give_the_same_tars_as_local_ones(tmp_path, folder, model, hub, file, fault):
    format, name = file
    prompt_format = load_prompt_format(model)
    local = tars(config_of(format, folder, name), tmp_path, prompt_format)
    hub.fault = FAULTS[fault]
    assert tars(config_of(format, ADDRESS, name), tmp_path, prompt_format) == local
    assert len(local[0]) == 1 and local[1] == [] and bool(hub.faults) == (fault != "none")


def test_files_are_read_again_only_when_they_were_replaced(tmp_path, hub, monkeypatch):
    """Even by a file of the same size; holds for digests and for the index in the shard cache."""
    hub.files["here/manifest.json"] = b'{"shards": []}'
    config = RecordsConfig(format="internvl", path=f"{ADDRESS}/meta.json")
    cache = DigestCache(tmp_path)
    before = records_fingerprint(config, cache.sha256)
    cache.save()
    start = hub.num_requests
    assert records_fingerprint(config, DigestCache(tmp_path).sha256) == before
    num_cached = hub.num_requests - start
    records_fingerprint(config, DigestCache(tmp_path / "other").sha256)
    num_uncached = hub.num_requests - start - num_cached
    assert num_cached < num_uncached, "a cached digest saves reading the annotation"

    monkeypatch.setenv("VICO_SHARD_CACHE", str(tmp_path / "cache"))
    shards = ShardCache(ADDRESS)
    assert shards.index("good.jsonl").read_bytes() == hub.files["here/good.jsonl"]
    hub.files["here/good.jsonl"] = hub.files["here/good.jsonl"].replace(b"what", b"WHAT")
    assert records_fingerprint(config, DigestCache(tmp_path).sha256) != before
    assert shards.index("good.jsonl").read_bytes() == hub.files["here/good.jsonl"]


@pytest.mark.parametrize("repository", ["org/set", "org/sett"])
def test_a_private_or_misspelt_data_set_is_not_a_missing_picture(tmp_path, folder, model, hub, repository):
    """The Hub gives the same answer for a data set whose token is missing and for one that does not exist."""
    hub.token = "a token" if repository == REPOSITORY else None
    root = f"hf://datasets/{repository}/here/images"
    config = RecordsConfig(format="llava", path=folder / "good.json", root=root)
    with pytest.raises(
        UserError, match=rf"{root}\S* may not be read, .*credentials, or correct its name"
    ) as caught:
        tars(config, tmp_path, load_prompt_format(model))
    assert "\n" not in str(caught.value)


def test_a_hub_that_never_answers_is_one_error_with_the_address(monkeypatch, hub):
    monkeypatch.setenv("VICO_REMOTE_PATIENCE_S", "0.5")
    hub.fault = lambda number: "503"
    with pytest.raises(Unreachable, match=rf"{ADDRESS}/meta.json could not be read in \d+ tries") as caught:
        record_sets(RecordsConfig(format="internvl", path=f"{ADDRESS}/meta.json"))
    assert "\n" not in str(caught.value)


def test_shards_are_built_from_the_hub_and_read_from_it(tmp_path, folder, model, hub, monkeypatch):
    """`vico data build` with a token; then the reader of the training on the uploaded folder."""
    content = {
        "inputs": {"records": {"format": "internvl", "path": f"{ADDRESS}/meta.json"}, "model": str(model)},
        "shard": {"samples_per_shard": 3, "test_share": 0, "calib_share": 0},
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(content))
    site = {"name": "test", "storage": str(tmp_path / "runs"), "tracking": {"enabled": False}}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    arguments = ("data", "build", tmp_path / "pipeline.yaml", "--site", tmp_path / "site.yaml")
    hub.token = f"hf_{uuid.uuid4().hex}"
    code, _, err = finished(vico(*arguments, extra_environment=environment(hub)))
    assert code == 2 and "may not be read" in err and "Traceback" not in err
    code, _, err = finished(vico(*arguments, extra_environment={**environment(hub), "HF_TOKEN": hub.token}))
    assert code == 0, err[-2000:]
    (output,) = (tmp_path / "runs" / "shard").glob("*/output")
    assert hub.token not in "".join(
        path.read_text(errors="ignore") for path in (tmp_path / "runs").rglob("*") if path.is_file()
    )

    hub.token = None
    hub.files.update(
        {f"shards/{path.name}": path.read_bytes() for path in output.iterdir() if path.is_file()}
    )
    monkeypatch.setenv("VICO_SHARD_CACHE", str(tmp_path / "cache"))
    form = load_prompt_format(model)
    local, remote = SampleReader(output, form), SampleReader("hf://datasets/org/set/shards", form)
    assert len(load_index("hf://datasets/org/set/shards")) == len(local.index) == 5
    for expected, sample in zip(local.samples(range(5)), remote.samples(range(5)), strict=True):
        assert sample.key == expected.key and np.array_equal(sample.pixels, expected.pixels)
