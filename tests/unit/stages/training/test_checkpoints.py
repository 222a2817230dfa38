"""Which checkpoint ranks load if their folders differ, and what is on the disk before a checkpoint is
published.

A file system that shows one node an old listing is not available here, so a fake engine answers for rank 0.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.metric_lines import STEP_METRICS_FILE, MetricLine
from stages.parts import Parts
from stages.training import checkpoints as train_checkpoints
from stages.training.checkpoints import (
    METADATA_FILE,
    Checkpoints,
    ResumePoint,
    checkpoints,
    remove_half_deleted,
    wait_until_visible,
)
from stages.training.metrics import read_metrics
from stages.training.universal import remove_conversions


def engine(steps_of_rank_0: list[int], rank: int = 1) -> SimpleNamespace:
    """Return a fake engine of one of two ranks; `steps_of_rank_0` are the checkpoints that rank 0 sees."""
    loaded: list[Path] = []

    def answer(value: object) -> object:
        return steps_of_rank_0 if isinstance(value, list) else value

    return SimpleNamespace(
        rank=rank,
        world_size=2,
        of_rank_0=answer,
        of_all_ranks=lambda value: [value],
        checkpoint_digests=lambda folder, tag: {},
        loaded=loaded,
        load_checkpoint=lambda folder, tag, universal: loaded.append(folder),
    )


def checkpoint(parts: Parts, step: int) -> Path:
    folder = parts.output / f"checkpoints/step-{step:07d}"
    folder.mkdir(parents=True)
    metadata = {"world_size": 2, "dtype": "float32", "probe_loss": 1.0, "kept": {"step": step}}
    (folder / METADATA_FILE).write_text(json.dumps(metadata))
    return folder


def checkpoints_of(
    engine: SimpleNamespace, parts: Parts, before_publishing: Callable[[], None] = lambda: None
) -> Checkpoints:
    return Checkpoints(engine, parts, 2, lambda step: 1.0, kernels="k", before_publishing=before_publishing)


def test_a_rank_loads_what_rank_0_chose_and_not_the_newest_it_sees(tmp_path):
    parts = Parts(tmp_path, 1)
    older = checkpoint(parts, 10)
    checkpoint(parts, 20)
    with_older = engine([10])
    start = checkpoints_of(with_older, parts).restore()
    assert (start.step, with_older.loaded, start.kept) == (10, [older], {"step": 10})
    assert start.metrics["resume_loss_change"] == 0
    without = engine([])
    assert checkpoints_of(without, parts).restore() == ResumePoint() and without.loaded == []


def test_a_folder_that_never_becomes_visible_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(train_checkpoints, "_VISIBLE_S", 0.2)
    monkeypatch.setattr(train_checkpoints, "_LOOK_AGAIN_S", 0.05)
    with pytest.raises(RuntimeError, match=r"step-9 exists on the node of rank 0 .* that all nodes see"):
        wait_until_visible(tmp_path / "step-9")


def test_metrics_are_synced_before_the_checkpoint_of_their_steps_is_published(tmp_path):
    parts, name, seen = Parts(tmp_path, 1), "checkpoints/step-0000010", []
    writing = checkpoints_of(
        engine([], rank=0), parts, before_publishing=lambda: seen.append(parts.done(name))
    )
    folder = parts.partial(name)
    folder.mkdir()
    writing._pending = 10, folder, {"step": 10}
    writing.publish_if(False)
    assert seen == []
    writing.publish_if(True)
    assert seen == [False] and parts.done(name)


def test_what_dead_ranks_left_of_checkpoints_is_removed_before_the_next_start(tmp_path):
    parts = Parts(tmp_path, 2)
    checkpoint(parts, 5)
    for name in ("checkpoints/.step-0000003.partial-2-ab", "best/.step-0000004.partial-2"):
        (parts.output / name / "state").mkdir(parents=True)
    for attempt in (1, 2):
        (parts.folder / f"attempts/{attempt}/universal/step-0000003").mkdir(parents=True)
    remove_half_deleted(parts)
    remove_conversions(parts)
    assert [path.name for path in tmp_path.glob("output/*/*")] == ["step-0000005"]
    assert [step for step, _ in checkpoints(parts)] == [5]
    assert not list(tmp_path.glob("attempts/*/universal/*"))


def test_copies_of_checkpoints_and_attempts_are_none(tmp_path):
    parts = Parts(tmp_path, 1)
    checkpoint(parts, 5)
    shutil.copytree(parts.output / "checkpoints/step-0000005", parts.output / "checkpoints/step-0000005.bak")
    for name, step in (("1", 1), ("1.bak", 2)):
        (parts.folder / "attempts" / name).mkdir(parents=True, exist_ok=True)
        line = MetricLine(step, 0.0, {"loss": 0.5}).text()
        (parts.folder / "attempts" / name / STEP_METRICS_FILE).write_text(line)
    assert [step for step, _ in checkpoints(parts)] == [5]
    assert read_metrics(parts) == [(1, {"loss": 0.5})]
