"""Records behind a real S3 server: read whole through injected faults, or given up with one clear error."""

import pytest

from data_prep import remote_files as storage
from data_prep.records.blocks import block_rows, record_blocks
from data_prep.records.config import RecordsConfig, record_sets, records_fingerprint
from data_prep.records.rejection import Rejected
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
    """S3 means the proxy; no faults, and none counted yet."""
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(storage, "_LONGEST_PAUSE_S", 0.05)
    storage._filesystem_of.cache_clear()
    server.fault, server.faults[:] = lambda number: None, []
    return server


@pytest.mark.parametrize(("format", "name"), FORMATS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_servers_give_the_same_tars_as_local_files(
    tmp_path, folder, server, prompt_format, format, name, fault
):
    local = tars(config_of(format, folder, name), tmp_path, prompt_format)
    remote_config = config_of(format, f"s3://{BUCKET}/set", name)
    server.fault = FAULTS[fault]
    assert tars(remote_config, tmp_path, prompt_format) == local and local[1] == []
    assert bool(server.faults) == (fault != "none")


def test_identity_does_not_know_the_place_and_is_remembered(tmp_path, folder, server):
    config = RecordsConfig(format="internvl", path=f"s3://{BUCKET}/set/meta.json")
    here = records_fingerprint(RecordsConfig(format="internvl", path=folder / "meta.json"))
    cache = DigestCache(tmp_path)
    assert records_fingerprint(config, cache.sha256) == here
    cache.save()
    size = (folder / "good.jsonl").stat().st_size
    before = server.num_requests
    assert records_fingerprint(config, DigestCache(tmp_path).sha256) == here and size
    again = server.num_requests - before
    records_fingerprint(config, DigestCache(tmp_path / "other").sha256)
    assert again < server.num_requests - before - again, "the annotation was not read again"


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


def test_what_is_missing_or_outside_is_the_rows_fault(tmp_path, server, prompt_format):
    upload_rows = [
        row("absent.png"),
        row("../meta.json"),
        row("s3://other/x.png"),
        row("/etc/passwd"),
        row(""),
    ]
    path = write_lines(tmp_path / "rows.jsonl", upload_rows)
    config = RecordsConfig(format="llava", path=path, root=f"s3://{BUCKET}/set/images")
    (block,) = record_blocks(record_sets(config), 10)
    reasons = []
    for raw in block_rows(block):
        with pytest.raises(Rejected) as caught:
            checked_sample(raw, SETTINGS.rules, prompt_format)
        reasons.append(caught.value.reason)
    assert reasons[:4] == ["missing_image", *["path_outside_root"] * 3]


def test_missing_files_and_schemes_are_told_apart(monkeypatch):
    with pytest.raises(UserError, match=r"path=s3://records/set/none.json"):
        record_sets(RecordsConfig(format="internvl", path="s3://records/set/none.json"))
    with pytest.raises(UserError, match=r"path=s3://records/set/\*.parquet names no file"):
        record_sets(RecordsConfig(format="parquet", path="s3://records/set/*.parquet"))
