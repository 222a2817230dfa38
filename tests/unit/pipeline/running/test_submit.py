"""What is said of submitted runs whose server cannot be asked."""

import json

import pytest

from pipeline.results.runs import RunFile, StageEntry
from pipeline.running.jobs import JOB_VARIABLE, JobWatch, as_job_stands, submission_now, submission_state
from tests.ports import free_port


@pytest.fixture
def run():
    """A pending run that was handed to a server which is gone."""
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
    state, message = submission_state(run.submission)
    assert (state, "no Ray Jobs server answers there" in message) == ("unknown", True)
    stands = as_job_stands(run)
    assert (stands.state, stands.error) == ("pending", message)


def test_runs_that_need_no_server_are_not_asked_for(run):
    for other in (
        run.model_copy(update={"state": "done"}),
        run.model_copy(update={"submission": None}),
    ):
        assert as_job_stands(other) is other


def test_following_a_pending_run_ends_when_its_server_stays_away(run):
    assert JobWatch(every_s=0, patience_s=60).end(run) is None
    line = JobWatch(every_s=0, patience_s=0).end(run)
    assert line.startswith("run r1: pending: jobs.address=http://127.0.0.1:")


def test_following_a_running_run_goes_on_without_its_server(run):
    """Its driver writes into the storage folder, whoever can ask the server."""
    assert JobWatch(every_s=0, patience_s=0).end(run.model_copy(update={"state": "running"})) is None


def test_a_job_enters_its_own_submission_and_others_none(run, monkeypatch):
    """Also into a run that a command by hand took over while the job waited: the job has it then."""
    assert submission_now(run.submission) is None
    assert submission_now({"job": "of another kind"}) == {"job": "of another kind"}
    monkeypatch.setenv(JOB_VARIABLE, json.dumps(run.submission))
    for before in (run.submission, {**run.submission, "id": "vico-r1-9999"}, None):
        assert submission_now(before) == run.submission
