"""A consistency training that keeps what its frozen parts compute is the one that computes it in every step,
also after kills; and what is kept at all."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.consistency.disk import KeptBytes, check_disk, kept_bytes
from stages.consistency.packs import ConsistencyPacks
from stages.outputs import POLICY_FOLDER
from stages.parts import Parts
from stages.training.kept.files import KeptFiles
from stages.training.kept.folders import features_folder, kept_folder, states_folder
from stages.training.kept.outputs import KeptOutputs, shard_file
from stages.training.metrics import read_metrics
from stages.training.ranks.phases import read_phase
from tests.numerics.kept_case import settings_of
from tests.numerics.ranks import check_ranks, finish, start_scenarios, stop_ranks
from tests.numerics.router_case import write_case
from vico.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_case(tmp_path_factory.mktemp("kept"))


started = partial(start_scenarios, "tests.numerics.kept_case")


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """The folder of trainings on two ranks that keep what frozen parts compute, and that compute it."""
    cases = {
        "frozen": ({}, {}),
        "frozen-3": ({}, {"zero_stage": 3, "reference": "sharded"}),
        "whole": ({"train_vision": True}, {"reference": "sharded"}),
    }
    scenarios = [
        {"name": f"{case}-{way}", "config": config, "site": {"memory": {**memory, **limit}}}
        for case, (config, memory) in cases.items()
        for way, limit in {"kept": {}, "computed": {"frozen_outputs_gb": 0}}.items()
        if (case, way) != ("frozen-3", "computed")  # equal to ZeRO-2 except for rounding
    ]
    finish(*started(folder, scenarios, 2))
    return folder


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [dict(metrics) for _, metrics in read_metrics(Parts(folder, 1))]


@pytest.mark.parametrize(
    ("kept", "computed"),
    [("frozen", "frozen"), ("frozen-3", "frozen"), ("whole", "whole")],
    ids=["frozen tower", "frozen tower, ZeRO-3", "trained tower"],
)
def test_kept_and_computed_outputs_train_alike(trained, kept, computed):
    kept, computed = metrics_of(trained / f"{kept}-kept"), metrics_of(trained / f"{computed}-computed")
    assert len(kept) == len(computed) == 4
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [metrics[name] for metrics in kept], [metrics[name] for metrics in computed], rtol=1e-4
        )
    validated = [name for name in computed[-1] if name.startswith("validation_kl_")]
    assert validated
    for name in validated:
        assert kept[-1][name] == pytest.approx(computed[-1][name], rel=1e-4)


def test_features_are_kept_of_a_frozen_tower_and_states_of_the_reference(trained):
    for case, features in {"frozen": True, "frozen-3": True, "whole": False}.items():
        kept = Parts(trained / f"{case}-kept", 1)
        assert features_folder(kept).exists() == features
        assert list(states_folder(kept).glob("0*"))
    for case in ("frozen", "whole"):
        assert not kept_folder(Parts(trained / f"{case}-computed", 1)).exists()


def test_a_step_counts_the_flops_of_what_ran(trained):
    work = {}
    for case in ("frozen", "whole"):
        for way in ("kept", "computed"):
            metrics = metrics_of(trained / f"{case}-{way}")[0]
            work[case, way] = metrics["tflops_per_rank"] * metrics["seconds_step"]
    assert work["frozen", "kept"] < 0.7 * work["frozen", "computed"]
    assert work["frozen", "kept"] < work["whole", "kept"] < work["whole", "computed"]


def test_a_killed_training_ends_as_an_undisturbed_one_bit_for_bit(folder, trained):
    """Ranks are killed while features are computed, while the reference runs, and after a checkpoint."""
    parts = Parts(folder / "killed", 1)
    reached = [
        lambda: any(features_folder(parts).glob("0*")),
        lambda: any(states_folder(parts).glob("0*")),
        lambda: [step for step, _ in read_metrics(parts)][-1:] >= [3],
        lambda: False,
    ]
    phases = set()
    for attempt, is_reached in enumerate(reached, start=1):
        ranks, logs = started(folder, [{"name": "killed", "attempt": attempt}], 2)
        while not (ended := check_ranks(ranks, logs)) and not is_reached():
            phases.add(read_phase(Parts(parts.folder, attempt).attempt_folder))
            time.sleep(0.01)
        assert ended == (attempt == len(reached)), "the training ended before the kill"
        stop_ranks(ranks)
    weights, undisturbed = (
        (folder / name / "output" / POLICY_FOLDER / "model.safetensors").read_bytes()
        for name in ("killed", "frozen-kept")
    )
    assert weights == undisturbed
    units = {phase[2] for phase in phases if phase}  # what the driver can show before the first step
    assert units == {"shards of vision features", "shards of reference states"}


PER_TOKEN = 4 * 192  # bytes of a state or of a vision token: float32, both widths are 192


@pytest.mark.parametrize(
    ("config", "memory", "features", "states"),
    [
        ({"epochs": 1}, {}, False, False),
        ({"epochs": 3, "max_steps": 2}, {}, False, False),
        ({}, {"frozen_outputs_gb": 0}, False, False),
        ({}, {}, True, True),
        ({"train_vision": True}, {}, False, True),
        ({"target": "answers"}, {}, True, False),
        ({}, {"frozen_outputs_gb": 0.01}, False, True),
        ({"target": "answers"}, {"frozen_outputs_gb": 0.01}, False, False),
    ],
    ids=[
        "one pass",
        "less than one pass",
        "limit 0",
        "frozen tower",
        "trained tower",
        "answers as target",
        "features over the limit",
        "over the limit, answers as target",
    ],
)
def test_what_saves_work_and_fits_is_kept(folder, config, memory, features, states):
    settings = settings_of(folder, {"name": "none", "config": config, "site": {"memory": memory}})
    packs = ConsistencyPacks(settings)
    num_tiles, num_answers = (number_of(packs, column) for column in ("num_tiles", "answer_tokens"))
    assert 64 * num_tiles * PER_TOKEN > 0.01e9 > num_answers * PER_TOKEN > 0
    assert kept_bytes(settings, packs) == KeptBytes(
        features * 64 * num_tiles * PER_TOKEN, states * num_answers * PER_TOKEN
    )


def number_of(packs: ConsistencyPacks, column: str) -> int:
    """Return the sum of a column over all samples of train and calib."""
    table = packs.index.table([column, "split"]).to_pydict()
    return sum(
        value
        for value, split in zip(table[column], table["split"], strict=True)
        if split in ("train", "calib")
    )


def test_a_disk_without_room_for_kept_outputs_is_refused(folder, tmp_path):
    settings = replace(settings_of(folder, {"name": "disk"}), parts=Parts(tmp_path, 1))
    check_disk(settings, 2, KeptBytes())
    with pytest.raises(
        UserError,
        match=r"9000000\.0 GB of what its frozen parts compute; .* train\.memory\.frozen_outputs_gb: 0$",
    ):
        check_disk(settings, 2, KeptBytes(features=9 * 10**15))


def test_values_are_read_in_the_order_of_the_samples_also_of_those_without(folder, tmp_path):
    """The rows of a batch are in any order, and some have no picture."""
    packs = ConsistencyPacks(settings_of(folder, {"name": "order"}))
    shards = packs.kept_rows("num_tiles")
    tiles_of = dict(enumerate(packs.index.table(["num_tiles"])["num_tiles"].to_pylist()))
    files = KeptFiles(tmp_path, "maker", torch.bfloat16)
    for number, shard in shards.items():
        values = [torch.full((tiles_of[row], 2, 3), float(row % 100)) for row in shard.rows.tolist()]
        files.write(shard_file(number), shard.num_values, lambda values=values: iter(values))
    kept = KeptOutputs(files, shards, packs.index, (2, 3))
    with_tiles = [row for shard in shards.values() for row in shard.rows.tolist()]
    train = packs.index.columns("train")
    texts = train.rows[train.num_tiles == 0].tolist()
    assert texts, "the records contain samples without pictures"
    chosen = [with_tiles[-1], texts[0], with_tiles[0], with_tiles[len(with_tiles) // 2]]
    expected = [float(row % 100) for row in chosen for _ in range(tiles_of[row])]
    assert kept.of_rows(chosen)[:, 1, 2].tolist() == expected
    for empty in (texts[:1], []):
        assert torch.equal(kept.of_rows(empty), torch.zeros(0, 2, 3, dtype=torch.bfloat16))
