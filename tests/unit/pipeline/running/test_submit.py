"""What is shown of submitted runs whose job server does not answer."""

import json

import pytest

from cluster.launchers.launcher import JOB_VARIABLE
from pipeline.results.runs import RunFile, StageEntry
from pipeline.running.jobs import JobWatch, current_submission, job_status, with_job_state
from tests.ports import free_port


@pytest.fixture
def run() -> RunFile:
    """A pending run that was submitted to a server which is gone."""
    address = f"http://127.0.0.1:{free_port()}"
    return RunFile(
        run="r1",
        created="2026-01-01T00:00:00+00:00",
        pipeline="p",
        experiment="e",
        config={},
        site="s",
        stages={"shard": StageEntry(fingerprint="f")},
        submission={"kind": "ray-jobs", "address": address, "id": "vico-r1-0000"},
    )


def test_a_server_that_is_gone_leaves_the_state_and_is_named(run):
    status = job_status(run.submission)
    assert status.state == "unknown" and "no Ray Jobs server answers there" in status.message
    current = with_job_state(run)
    assert (current.state, current.error) == ("pending", status.message)


def test_the_server_is_not_asked_about_runs_that_do_not_need_it(run):
    for other in (
        run.model_copy(update={"state": "done"}),
        run.model_copy(update={"submission": None}),
    ):
        assert with_job_state(other) is other


def test_following_a_pending_run_ends_when_its_server_stays_away(run):
    assert JobWatch(every_s=0, patience_s=60).look(run) == (None, False)
    line, is_over = JobWatch(every_s=0, patience_s=0).look(run)
    assert is_over and line is not None and line.startswith("run r1: pending: jobs.address=http://127.0.0.1:")


def test_following_a_running_run_continues_without_its_server(run):
    """Its driver writes to the storage, whether or not the server answers."""
    running = run.model_copy(update={"state": "running"})
    assert JobWatch(every_s=0, patience_s=0).look(running) == (None, False)


def test_a_job_enters_its_own_submission_and_other_commands_none(run, monkeypatch):
    """A job also replaces the submission of a run that a command took over by hand while the job waited."""
    assert current_submission(run.submission) is None
    assert current_submission({"job": "of another kind"}) == {"job": "of another kind"}
    monkeypatch.setenv(JOB_VARIABLE, json.dumps(run.submission))
    for before in (run.submission, {**run.submission, "id": "vico-r1-9999"}, None):
        assert current_submission(before) == run.submission
