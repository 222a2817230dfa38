"""Records on a real S3 server: read completely despite injected faults, or given up with one clear error."""

import pytest

from data_prep import remote_files as storage
from data_prep.records.blocks import block_rows, record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.identity import records_fingerprint
from data_prep.records.rejection import Rejected
from data_prep.records.sets import record_sets
from data_prep.shards.checks import checked_sample
from pipeline.identity.file_digests import DigestCache
from tests.record_files import row, write_lines
from tests.record_tars import FORMATS, SETTINGS, config_of, files_of, tars, write_good_formats
from tests.s3_server import FAULTS, environment, s3_server, upload
from tests.tiny_model import make_tiny_model
from vico.errors import Unreachable, UserError
from vico.prompt import load_prompt_format

BUCKET = "records"


@pytest.fixture(scope="module")
def prompt_format(tmp_path_factory):
    return load_prompt_format(make_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, prompt_format):
    return write_good_formats(tmp_path_factory.mktemp("records"), 9, prompt_format)


@pytest.fixture(scope="module")
def server(folder):
    with s3_server() as proxy:
        upload(proxy, BUCKET, files_of(folder, "set"))
        yield proxy


@pytest.fixture(autouse=True)
def s3(server, monkeypatch):
    """Use the proxy for S3, without faults and with none counted."""
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(storage, "_LONGEST_PAUSE_S", 0.05)
    storage._filesystem_of.cache_clear()
    server.fault, server.faults[:] = lambda number: None, []
    return server


@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_server_gives_the_same_tars_as_local_files(
    tmp_path, folder, server, prompt_format, file, fault
):
    format, name = file
    local = tars(config_of(format, folder, name), tmp_path, prompt_format)
    remote_config = config_of(format, f"s3://{BUCKET}/set", name)
    server.fault = FAULTS[fault]
    assert tars(remote_config, tmp_path, prompt_format) == local and local[1] == []
    assert bool(server.faults) == (fault != "none")


def test_the_fingerprint_does_not_depend_on_the_address_and_is_cached(tmp_path, folder, server):
    config = RecordsConfig(format="internvl", path=f"s3://{BUCKET}/set/meta.json")
    local = records_fingerprint(RecordsConfig(format="internvl", path=folder / "meta.json"))
    cache = DigestCache(tmp_path)
    assert records_fingerprint(config, cache.sha256) == local
    cache.save()
    before = server.num_requests
    assert records_fingerprint(config, DigestCache(tmp_path).sha256) == local
    num_cached = server.num_requests - before
    records_fingerprint(config, DigestCache(tmp_path / "other").sha256)
    num_uncached = server.num_requests - before - num_cached
    assert num_cached < num_uncached, "a cached digest saves reading the annotation"


def test_a_server_that_never_answers_is_one_error_with_the_address(monkeypatch, server, prompt_format):
    (block,) = record_blocks(record_sets(config_of("llava", f"s3://{BUCKET}/set", "good.json")), 99)
    monkeypatch.setenv("VICO_REMOTE_PATIENCE_S", "0.5")
    for fault in ("503", "stop"):
        server.fault = lambda number, fault=fault: fault
        with pytest.raises(
            Unreachable, match=r"s3://records/set/\S+ could not be read in \d+ tries"
        ) as caught:
            for raw in block_rows(block):
                checked_sample(raw, SETTINGS.rules, prompt_format)
        assert "\n" not in str(caught.value)


def test_rows_with_missing_pictures_or_pictures_outside_the_root_are_rejected(
    tmp_path, server, prompt_format
):
    rows = [
        row("absent.png"),
        row("../meta.json"),
        row("s3://other/x.png"),
        row("/etc/passwd"),
        row(""),
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    config = RecordsConfig(format="llava", path=path, root=f"s3://{BUCKET}/set/images")
    (block,) = record_blocks(record_sets(config), 10)
    reasons = []
    for raw in block_rows(block):
        with pytest.raises(Rejected) as caught:
            checked_sample(raw, SETTINGS.rules, prompt_format)
        reasons.append(caught.value.reason)
    assert reasons[:4] == ["missing_image", *["path_outside_root"] * 3]


def test_a_missing_file_and_a_pattern_without_files_have_their_own_messages():
    with pytest.raises(UserError, match=r"path=s3://records/set/none.json"):
        record_sets(RecordsConfig(format="internvl", path="s3://records/set/none.json"))
    with pytest.raises(UserError, match=r"path=s3://records/set/\*.parquet matches no file"):
        record_sets(RecordsConfig(format="parquet", path="s3://records/set/*.parquet"))
