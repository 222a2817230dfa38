"""Records and shards at `hf://`: the Hub's own client against a server on loopback that speaks its API."""

import uuid
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.utils._http
import numpy as np
import pytest
import yaml

from data_prep import remote_files as storage
from data_prep.records.config import RecordsConfig, record_sets, records_fingerprint
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

PLACE = "hf://datasets/org/set/here"
REPOSITORY = "org/set"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    return write_good_formats(tmp_path_factory.mktemp("records"), 5, load_prompt_format(model))


@pytest.fixture
def hub(folder, monkeypatch):
    """`hf://` means the server in this process; the client read HF_ENDPOINT when it was imported."""
    with hub_server(REPOSITORY, files_of(folder, "here")) as hub:
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        path = template.removeprefix(huggingface_hub.constants.ENDPOINT)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + path)
        monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.01)
        # the client's own tries, seconds apart; they are made as ever
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
@pytest.mark.parametrize(("format", "name"), FORMATS)
def test_records_of_the_hub_give_the_tars_of_local_ones(tmp_path, folder, model, hub, format, name, fault):
    prompt_format = load_prompt_format(model)
    local = tars(config_of(format, folder, name), tmp_path, prompt_format)
    hub.fault = FAULTS[fault]
    assert tars(config_of(format, PLACE, name), tmp_path, prompt_format) == local
    assert len(local[0]) == 1 and local[1] == [] and bool(hub.faults) == (fault != "none")


def test_files_are_known_again_unread_until_they_are_replaced(tmp_path, hub, monkeypatch):
    """Also by a file of equal size, for digests and for the index in the shard cache."""
    hub.files["here/manifest.json"] = b'{"shards": []}'
    config = RecordsConfig(format="internvl", path=f"{PLACE}/meta.json")
    cache = DigestCache(tmp_path)
    before = records_fingerprint(config, cache.sha256)
    cache.save()
    start = hub.num_requests
    assert records_fingerprint(config, DigestCache(tmp_path).sha256) == before
    again = hub.num_requests - start
    records_fingerprint(config, DigestCache(tmp_path / "other").sha256)
    assert again < hub.num_requests - start - again, "the annotation was read again"

    monkeypatch.setenv("VICO_SHARD_CACHE", str(tmp_path / "cache"))
    shards = ShardCache(PLACE)
    assert shards.index("good.jsonl").read_bytes() == hub.files["here/good.jsonl"]
    hub.files["here/good.jsonl"] = hub.files["here/good.jsonl"].replace(b"what", b"WHAT")
    assert records_fingerprint(config, DigestCache(tmp_path).sha256) != before
    assert shards.index("good.jsonl").read_bytes() == hub.files["here/good.jsonl"]


@pytest.mark.parametrize("repository", ["org/set", "org/sett"])
def test_a_private_or_misspelt_data_set_is_no_missing_picture(tmp_path, folder, model, hub, repository):
    """Without its token a data set looks as if it were not there; the Hub says the same of both."""
    hub.token = "a token" if repository == REPOSITORY else None
    place = f"hf://datasets/{repository}/here/images"
    config = RecordsConfig(format="llava", path=folder / "good.json", root=place)
    with pytest.raises(
        UserError, match=rf"{place}\S* may not be read, .*credentials, or mend its name"
    ) as caught:
        tars(config, tmp_path, load_prompt_format(model))
    assert "\n" not in str(caught.value)


def test_a_hub_that_never_answers_is_one_error_with_the_address(monkeypatch, hub):
    monkeypatch.setenv("VICO_REMOTE_PATIENCE_S", "0.5")
    hub.fault = lambda number: "503"
    with pytest.raises(Unreachable, match=rf"{PLACE}/meta.json could not be read in \d+ tries") as caught:
        record_sets(RecordsConfig(format="internvl", path=f"{PLACE}/meta.json"))
    assert "\n" not in str(caught.value)


def test_a_shard_folder_is_built_from_the_hub_and_read_from_it(tmp_path, folder, model, hub, monkeypatch):
    """`vico data build` as a user gives it, token and all; then training's reader on the folder, uploaded."""
    content = {
        "inputs": {"records": {"format": "internvl", "path": f"{PLACE}/meta.json"}, "model": str(model)},
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
    here, there = SampleReader(output, form), SampleReader("hf://datasets/org/set/shards", form)
    assert len(load_index("hf://datasets/org/set/shards")) == len(here.index) == 5
    for ours, other in zip(here.samples(range(5)), there.samples(range(5)), strict=True):
        assert ours.key == other.key and np.array_equal(ours.pixels, other.pixels)
