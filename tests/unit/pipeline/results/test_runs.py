import json
import shutil

import pytest

from cluster.launchers.by_kind import launcher_of_submission
from pipeline.results.garbage import collect_garbage
from pipeline.results.runs import Runs, pipeline_digest
from pipeline.running.jobs import with_job_state
from pipeline.storage.leases import Leases
from vico.errors import UserError


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def create(runs, pipeline="p", **options):
    fingerprints = {"shard": "a" * 64, "label": "b" * 64}
    return runs.create(
        pipeline=pipeline, fingerprints=fingerprints, experiment="e", config={}, site="s", **options
    )


def edit(runs, run, **fields):
    path = runs.run_folder(run.run) / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_runs_are_listed_newest_first_and_found_by_id_prefix_and_latest(runs):
    ids = [create(runs).run for _ in range(3)]
    assert [run.run for run in runs.all()] == ids[::-1]
    assert runs.named("latest").run == ids[2]
    assert runs.named(ids[0]).run == ids[0]
    assert runs.named(ids[1][:-1]).run == ids[1]


def test_a_name_that_fits_none_or_several_is_refused(runs):
    with pytest.raises(UserError, match="there are no runs in"):
        runs.named("latest")
    first = create(runs).run
    second = create(runs).run
    with pytest.raises(UserError, match="'nope' is not a run in"):
        runs.named("nope")
    with pytest.raises(UserError, match="give more characters") as error:
        runs.named("20")
    assert first in str(error.value) and second in str(error.value)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_only_run(runs, name):
    """As a shell passes a variable that is not set; every run begins with it."""
    create(runs)
    with pytest.raises(UserError, match="RUN is empty; give an id"):
        runs.named(name)
    with pytest.raises(UserError, match="RUN is empty; give an id"):
        collect_garbage(runs.folder.parent, [name], dry_run=False)


def test_a_copied_folder_is_not_taken_for_the_run_that_it_was_copied_from(runs):
    run = create(runs)
    shutil.copytree(runs.run_folder(run.run), runs.run_folder("copy"))
    message = rf"copy/run.json is damaged \(it is of run '{run.run}'\); "
    with pytest.raises(UserError, match=message):
        runs.named("copy")
    with pytest.raises(UserError, match=message):
        collect_garbage(runs.folder.parent, ["copy"], dry_run=False)
    assert runs.named(run.run) == run


def test_the_latest_run_of_a_pipeline_is_not_a_cancelled_one(runs):
    first, cancelled = create(runs), create(runs)
    create(runs, pipeline="other")
    edit(runs, cancelled, state="cancelled")
    assert runs.latest_of("p").run == first.run
    assert runs.latest_of("nobody's") is None


def test_a_running_run_without_a_driver_is_interrupted(runs):
    run = create(runs, submission={"job": "j"})
    stages = {"shard": {"fingerprint": "a", "state": "running"}, "label": {"fingerprint": "b"}}
    attempts = [{"started": "t", "host": "h", "pid": 1}]
    edit(runs, run, state="running", stages=stages, attempts=attempts)
    with Leases(runs.storage).acquire(runs.run_folder(run.run), run.run):
        assert runs.named(run.run).state == "running"
    stored = runs.named(run.run)
    assert stored.state == stored.attempts[0].state == "interrupted"
    assert stored.submission == {"job": "j"}
    assert [entry.state for entry in stored.stages.values()] == ["interrupted", "pending"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "not valid JSON at line 1"),
        ('{"schema": 1, "run": "x"', "not valid JSON"),
        ('{"schema": 1, "run": "x"}', "is damaged (created: field required)"),
        ('{"schema": 2}', "has schema 2, this vico reads 1"),
        ("{}", "has schema None"),
        ("\x00", "not valid JSON"),
    ],
)
def test_a_damaged_run_file_is_named_with_a_remedy(runs, content, message):
    run = create(runs)
    path = runs.run_folder(run.run) / "run.json"
    path.write_text(content)
    for look in (runs.all, lambda: runs.named("latest"), lambda: runs.latest_of("p")):
        with pytest.raises(UserError) as error:
            look()
        assert message in str(error.value) and str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_run_file_without_stages_is_damaged(runs):
    run = create(runs)
    edit(runs, run, stages={})
    with pytest.raises(UserError, match=r"is damaged \(stages: .* at least 1 item"):
        runs.all()


@pytest.mark.parametrize(
    "submission, field",
    [
        ({"kind": "slurm", "id": "7"}, "folder=None"),
        ({"kind": "local", "folder": 5, "id": "7"}, "folder=5"),
        ({"kind": "ray-jobs", "address": "http://h:1"}, "id=None"),
    ],
)
def test_a_submission_that_does_not_lead_to_its_job_is_one_line(runs, submission, field):
    run = create(runs, submission=submission)
    state = with_job_state(run)
    assert state.state == "pending"
    assert f"submission.{field} in run.json does not lead to the job; ask its scheduler" in state.error
    with pytest.raises(UserError, match=f"submission.{field}"):
        launcher_of_submission(submission)


def test_a_pipeline_is_its_stages_in_order():
    assert pipeline_digest({"a": "1", "b": "2"}) != pipeline_digest({"b": "2", "a": "1"})
