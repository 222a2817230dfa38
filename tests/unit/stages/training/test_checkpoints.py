"""Which checkpoint ranks load where their folders do not look alike, and what is on the disk before its name.

A file system that shows one node an old listing cannot be had here, so the engine is a stand-in that answers
for rank 0.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.parts import Parts
from stages.training import checkpoints as train_checkpoints
from stages.training.checkpoints import (
    FACTS_FILE,
    Checkpoints,
    checkpoints,
    remove_half_deleted,
    wait_until_visible,
)
from stages.training.universal import remove_conversions


def engine(**of_rank_0) -> SimpleNamespace:
    """Rank 1 of two; `chosen` is what rank 0 answers where a list of steps is asked for."""
    loaded: list[Path] = []

    def answer(value):
        return of_rank_0["chosen"] if isinstance(value, list) else value

    return SimpleNamespace(
        rank=1,
        world_size=2,
        of_rank_0=answer,
        loaded=loaded,
        load_checkpoint=lambda folder, tag, universal: loaded.append(folder),
    )


def checkpoint(parts: Parts, step: int, **facts) -> Path:
    folder = parts.output / f"checkpoints/step-{step:07d}"
    folder.mkdir(parents=True)
    content = {"world_size": 2, "dtype": "float32", "probe_loss": 1.0, "kept": {"step": step}, **facts}
    (folder / FACTS_FILE).write_text(json.dumps(content))
    return folder


def opened(engine, parts: Parts, **more) -> Checkpoints:
    given = {"kernels": "k", "before_publishing": lambda: None, **more}
    return Checkpoints(engine, parts, 2, lambda step: 1.0, **given)


def test_a_rank_loads_what_rank_0_chose_and_not_the_newest_it_sees(tmp_path):
    parts = Parts(tmp_path, 1)
    older = checkpoint(parts, 10)
    checkpoint(parts, 20)
    one = engine(chosen=[10])
    step, metrics, kept = opened(one, parts).restore()
    assert (step, one.loaded, kept) == (10, [older], {"step": 10})
    assert metrics["resume_loss_change"] == 0
    none = engine(chosen=[])
    assert opened(none, parts).restore() == (0, {}, {}) and none.loaded == []


def test_a_folder_that_never_shows_ends_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(train_checkpoints, "_VISIBLE_S", 0.2)
    monkeypatch.setattr(train_checkpoints, "_LOOK_AGAIN_S", 0.05)
    with pytest.raises(RuntimeError, match=r"step-9 is there on the node of rank 0 .* that all nodes see"):
        wait_until_visible(tmp_path / "step-9")


def test_metrics_are_synced_before_the_checkpoint_of_their_steps_has_a_name(tmp_path):
    parts, name, seen = Parts(tmp_path, 1), "checkpoints/step-0000010", []
    one = engine(chosen=[])
    one.rank = 0
    writing = opened(
        one, parts, before_publishing=lambda: seen.append(parts.done("checkpoints/step-0000010"))
    )
    folder = parts.partial(name)
    folder.mkdir()
    writing._pending = 10, folder, {"step": 10}
    writing.publish_if(False)
    assert seen == []
    writing.publish_if(True)
    assert seen == [False] and parts.done(name)


def test_what_dead_ranks_left_of_checkpoints_goes_before_the_next_start(tmp_path):
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
