"""Several sources of records in one pipeline."""

import pytest
from pydantic import ValidationError

from data_prep.records.blocks import block_rows, record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.identity import records_fingerprint
from data_prep.records.sets import demo_sets, record_sets
from tests.record_files import row, write_lines, write_meta
from vico.errors import UserError


def test_sources_are_read_in_their_order_with_their_weights(tmp_path):
    write_lines(tmp_path / "a.jsonl", [row(), row(answer="b")])
    write_lines(tmp_path / "lines" / "a.jsonl", [row(answer="c")])
    meta = write_meta(tmp_path, a={"repeat_time": 3})
    sources = [
        {"format": "internvl", "path": str(meta), "weight": 0.5},
        {"format": "llava", "path": str(tmp_path / "lines"), "name": "web", "license": "CC0"},
        {"format": "demo", "num_samples": 2, "weight": 2},
    ]
    config = RecordsConfig.model_validate(sources)
    assert RecordsConfig.model_validate_json(config.model_dump_json()) == config
    sets = record_sets(config)
    assert [(s.name, s.repeat, s.license) for s in sets] == [
        ("a", 1.5, ""),
        ("web-a", 1.0, "CC0"),
        ("demo", 2.0, ""),
    ]
    assert [len(list(block_rows(block))) for block in record_blocks(sets, 10)] == [2, 1, 2]
    assert demo_sets(config) == {"demo": config.sources[2]}
    assert [s.name for s in record_sets(config, heldout=True)] == [
        "heldout-a",
        "heldout-web-a",
        "heldout-demo",
    ]
    digests = {records_fingerprint(config)}
    for change in ({"weight": 0.25}, {"name": "x"}):
        first = config.sources[0].model_copy(update=change)
        digests.add(records_fingerprint(config.model_copy(update={"sources": (first, *config.sources[1:])})))
    assert len(digests) == 3
    sources[1].pop("name")
    with pytest.raises(UserError, match="give its source a name"):
        record_sets(RecordsConfig.model_validate(sources))


@pytest.mark.parametrize(
    "value, words",
    [
        ([], "at least one source"),
        ([[{"format": "demo"}]], "a list itself"),
        ([{"format": "demo", "weight": 0}], "greater than 0"),
        ([{"format": "demo", "path": "x"}], "path=x has no effect"),
        ({"format": "sources", "sources": [{"format": "demo"}], "weight": 2}, "weight=2.0 has no effect"),
        ({"format": "demo", "sources": [{"format": "demo"}]}, "no effect with format=demo"),
    ],
)
def test_a_list_that_means_nothing_is_refused(value, words):
    with pytest.raises(ValidationError, match=words):
        RecordsConfig.model_validate(value)
