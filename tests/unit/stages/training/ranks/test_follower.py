"""What the driver does while a training runs."""

import threading
import time
from types import SimpleNamespace

import pytest

from cluster.metric_lines import MetricsWriter
from stages.parts import Parts
from stages.training.ranks.follower import Follower
from tests.stage_context import stage_context
from tests.waiting import wait_until


def test_a_collapse_and_spikes_are_noted_while_the_training_continues(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.training.ranks.follower._FOLLOW_S", 0.01)
    context = stage_context("consistency", tmp_path, {})
    report = MetricsWriter(context.parts.attempt_folder / "metrics.jsonl")
    over = {10: 1.2, 20: 1.6, 30: 9.0, 40: 1.0, 50: 2.0}
    for step in range(1, 61):
        spikes = 2.0 + max(0.0, step - 54)  # 2 in an earlier attempt and 6 here: the 3rd and 6th are noted
        kl = {"validation_kl_over_best": over[step]} if step in over else {}
        report.append(step, {"loss": 1.0, "loss_spikes": spikes, **kl})
    with Follower(context, 60):
        wait_until(lambda: (60, 60, "steps") in context.reported)
    notes = [line.split(";")[0] for line in context.reported if isinstance(line, str)]
    assert notes == [
        "step 20: the validation KL is 1.60 times its best",
        "step 50: the validation KL is 2.00 times its best",
        "step 55: spike 3 of the loss (1)",
        "step 58: spike 6 of the loss (1)",
    ]


def test_the_follower_survives_a_folder_that_fails(tmp_path, monkeypatch, caplog):
    """It still notices later that the training has to stop, and notifies the ranks repeatedly."""
    monkeypatch.setattr("stages.training.ranks.follower._FOLLOW_S", 0.01)
    notified, lost = [], threading.Event()

    def progress(*_):
        raise OSError("Stale file handle")

    def check():
        if lost.is_set():
            raise RuntimeError("the lease is lost")

    def notice(folder, rank, text):
        notified.append((rank, text))
        if len(notified) < 5:
            raise OSError("No space left on device")

    monkeypatch.setattr("stages.training.ranks.follower.write_notice", notice)
    site = SimpleNamespace(resources=SimpleNamespace(workers=2))
    context = SimpleNamespace(parts=Parts(tmp_path, 1), progress=progress, check=check, site=site)
    with Follower(context, 10) as follower:
        time.sleep(0.1)
        lost.set()
        wait_until(lambda: len(notified) >= 9)
    assert {rank for rank, _ in notified[5:]} == {0, 1}
    with pytest.raises(RuntimeError, match="the lease is lost"):
        follower.raise_what_stopped()
    assert caplog.text.count("Stale file handle") == caplog.text.count("No space left") == 1
