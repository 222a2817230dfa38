"""Commands on tiny stages: what runs again and why, what is refused, what is reported."""

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.integration.tiny_pipeline.project import ROOT, TinyProject
from tests.waiting import PATIENCE_S


@pytest.fixture
def project(tmp_path):
    project = TinyProject(tmp_path / "project")
    yield project
    project.close()


@pytest.fixture
def done(project):
    project.vico("run")
    return project


def actions(plan):
    return {stage: action for stage, (action, _) in plan.items()}


def test_a_plan_writes_nothing(project):
    assert project.plan() == {stage: ("run", ["no earlier result"]) for stage in ("draw", "square", "total")}
    assert not project.storage.exists()


def test_a_changed_field_is_named_and_what_depends_on_it_runs(done):
    plan = done.plan("--set", "square.power=3")
    assert plan["draw"][0] == "reuse"
    assert plan["square"] == ("run", ["square.power: 2 -> 3"])
    assert plan["total"][0] == "run"
    assert plan["total"][1][0].startswith("square fingerprint: ")
    first = done.status()["run"]
    done.vico("run", "--set", "square.power=3")
    stages = {stage["name"]: stage for stage in done.status()["stages"]}
    assert stages["draw"]["reused"] and stages["draw"]["reused_from"] == first
    assert not stages["square"]["reused"] and not stages["total"]["reused"]
    assert actions(done.plan()) == dict.fromkeys(("draw", "square", "total"), "reuse")


def test_a_plan_shows_what_stages_needed_before(done):
    planned = {
        stage["stage"]: stage for stage in json.loads(done.vico("plan", "--json", "--set", "square.power=3"))
    }
    assert planned["draw"]["expected"] is None, "it would not run"
    expected, record = planned["square"]["expected"], done.record("square")
    assert expected["seconds"] == record["seconds"]
    assert expected["storage_bytes"] == sum(file["bytes"] for file in record["outputs"].values())
    assert expected["memory_bytes"] > 1e8 and expected["source"] == f"as in run {record['run']}"
    assert f"memory (as in run {record['run']})" in done.vico("plan", "--set", "square.power=3")


def test_changed_records_and_seeds_are_reasons(done):
    (reason,) = done.plan("--set", "inputs.records.num_samples=5")["draw"][1]
    assert reason.startswith("records digest: ")
    assert done.plan("--set", "seed=8")["draw"][1] == ["draw.seed: 7 -> 8"]
    assert done.plan("--set", "draw.scale=1")["draw"][1] == ["draw.scale: 0.1 -> 1.0"]
    (reason,) = done.plan("--set", "inputs.heldout={format: demo, num_samples: 3}")["draw"][1]
    assert reason.startswith("heldout digest: nothing -> ")


def test_edits_without_an_effect_on_results_rerun_nothing(done):
    path = done.folder / "pipeline.yaml"
    lines = path.read_text().strip().splitlines()
    path.write_text(
        "# a comment\n" + "draw: {num_parts: 4, scale: 0.1}\nexperiment: other\n" + "\n".join(lines[:-1])
    )
    (done.folder / "site.yaml").write_text(
        "name: elsewhere\ntracking: {enabled: false}\nresources: {workers: 1}\n"
    )
    assert actions(done.plan()) == dict.fromkeys(("draw", "square", "total"), "reuse")


def test_code_that_changed_under_a_fingerprint_is_reported(done):
    sources = done.record("square")["sources"]
    name = "tests/integration/tiny_pipeline/square.py"
    assert name in sources and "stages/context.py" in sources
    done.edit_record("square", sources={**sources, name: "0" * 64})
    action, reasons = done.plan()["square"]
    assert action == "reuse"
    assert reasons[1] == f"{name} changed since; fingerprint kept, code_version 1"


def test_strict_code_reruns_results_of_other_code(done):
    name = "tests/integration/tiny_pipeline/square.py"
    done.edit_record("square", sources={**done.record("square")["sources"], name: "0" * 64})
    plan = done.plan("--strict-code")
    assert plan["draw"][0] == "reuse"
    assert plan["square"] == ("run", [f"{name} changed since (--strict-code)"])
    assert plan["total"] == ("run", ["runs after square, unless the output stays the same"])
    done.vico("run", "--strict-code")
    stages = {stage["name"]: stage for stage in done.status()["stages"]}
    assert [entry["attempt"] for entry in stages.values()] == [1, 2, 1]
    assert stages["total"]["reused"], "the new code gave the same bytes"
    assert actions(done.plan("--strict-code")) == dict.fromkeys(("draw", "square", "total"), "reuse")
    assert len(done.runs()) == 2
    done.vico("run", "--strict-code")
    assert len(done.runs()) == 2


def test_a_stage_resumes_after_its_code_was_fixed_and_says_so(project):
    """Parts of the failed attempt are kept; `--strict-code` rebuilds them, even after the stage is done."""
    project.vico("run", code=-9, TINY_KILL="square:2")
    name = "tests/integration/tiny_pipeline/square.py"
    begun = project.stage("square") / "attempts/1/attempt.json"
    content = json.loads(begun.read_text())
    assert name in content["sources"]
    begun.write_text(json.dumps({**content, "sources": {**content["sources"], name: "0" * 64}}))
    resumes = f"unfinished: resumes from attempt 1; {name} changed since, and its parts are kept"
    assert project.plan()["square"] == ("run", [resumes])
    assert project.plan("--strict-code")["square"] == ("run", [f"{name} changed since (--strict-code)"])
    assert resumes in project.vico("run")
    assert list(project.record("square")["facts"]["sources_of_attempts"]) == ["1", "2"]
    mixed = "made by attempts of different code (1, 2)"
    assert project.plan()["square"][1][1] == f"{mixed}; fingerprint kept, code_version 1"
    assert project.plan("--strict-code")["square"] == ("run", [f"{mixed} (--strict-code)"])
    project.vico("run", "--strict-code")
    assert (project.stage("square") / "superseded/1/record.json").exists()
    assert "sources_of_attempts" not in project.record("square")["facts"]
    assert actions(project.plan("--strict-code")) == dict.fromkeys(("draw", "square", "total"), "reuse")


def test_an_attempt_that_published_nothing_does_not_count_as_other_code(project):
    project.vico("run", code=1, TINY_FAIL="square:0")
    name = "tests/integration/tiny_pipeline/square.py"
    begun = project.stage("square") / "attempts/1/attempt.json"
    content = json.loads(begun.read_text())
    begun.write_text(json.dumps({**content, "sources": {**content["sources"], name: "0" * 64}}))
    resumes = "unfinished: resumes from attempt 1"
    assert project.plan("--strict-code")["square"] == project.plan()["square"] == ("run", [resumes])
    project.vico("run")
    assert project.record("square")["attempt"] == 2
    assert "sources_of_attempts" not in project.record("square")["facts"]
    assert actions(project.plan("--strict-code")) == dict.fromkeys(("draw", "square", "total"), "reuse")


def test_a_missing_output_is_rebuilt_without_the_rest(done):
    before = done.outputs()
    part = done.stage("square") / "output" / "part-1.txt"
    kept = (done.stage("square") / "output" / "part-0.txt").stat().st_ino
    part.unlink()
    plan = done.plan()
    assert plan["square"] == ("run", ["output/part-1.txt is missing; to be rebuilt"])
    assert plan["total"] == ("run", ["runs after square, unless the output stays the same"])
    done.vico("run")
    assert done.outputs() == before
    assert (done.stage("square") / "output" / "part-0.txt").stat().st_ino == kept
    stages = {stage["name"]: stage["reused"] for stage in done.status()["stages"]}
    assert stages == {"draw": True, "square": False, "total": True}


def test_a_truncated_output_is_superseded_and_rebuilt(done):
    before = done.outputs()
    part = done.stage("draw") / "output" / "part-3.txt"
    part.write_text("cut")
    done.vico("run")
    assert done.outputs() == before
    assert (done.stage("draw") / "superseded/1/output/part-3.txt").read_text() == "cut"


def test_a_stage_that_does_not_notice_what_is_missing_is_rerun_from_scratch(done):
    before = done.outputs()
    (done.stage("total") / "output" / "copy" / "part-2.txt").unlink()  # the stage asks for the folder only
    output = done.vico("run")
    assert "total: earlier result moved to" in output and "resuming did not rebuild copy/part-2.txt" in output
    assert done.outputs() == before
    assert done.record("total")["attempt"] == 3


def test_other_bytes_of_an_input_are_not_built_on(done):
    """The input was made again with a different result: same fingerprint, other bytes."""
    draw = done.stage("draw")
    record = json.loads((draw / "record.json").read_text())
    shutil.rmtree(draw)
    done.vico("run", "--set", "draw.scale=0.2", "--until", "draw")
    (other,) = (done.storage / "draw").iterdir()
    other_record = json.loads((other / "record.json").read_text())
    other.rename(draw)
    kept = ("fingerprint", "identity")
    done.edit_record("draw", **{name: record[name] for name in kept})
    plan = done.plan()
    assert plan["draw"][0] == "reuse"
    assert plan["square"][0] == "run" and plan["square"][1][0].startswith("input bytes changed: draw ")
    done.vico("run")
    assert (done.stage("square") / "superseded/1/record.json").exists()
    assert done.record("square")["inputs"]["draw"] == other_record["output_digest"]


def test_a_result_that_is_replaced_while_a_stage_reads_it_fails_the_stage(project):
    process, go = project.pause("square:1")
    record = project.stage("draw") / "record.json"
    record.rename(project.folder / "record.json")  # as --force does, in a command of another pipeline
    go.touch()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert "another command replaced the result of stage draw" in errors
    assert not (project.stage("square") / "record.json").exists()
    (project.folder / "record.json").rename(record)
    project.vico("run")


def test_records_that_are_edited_while_a_stage_reads_them_fail_the_stage(project):
    rows, meta = project.folder / "rows.jsonl", project.folder / "meta.json"
    rows.write_text("{}\n")
    meta.write_text(
        json.dumps({"a": {"root": str(project.folder), "annotation": str(rows), "repeat_time": 1}})
    )
    records = ("--set", f"inputs.records={{format: internvl, path: {meta}}}")
    process, go = project.pause("draw:1", *records)
    rows.write_text("{}\n{}\n")
    go.touch()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert "inputs.records: its files changed after this run had read their digests" in errors
    assert not (project.stage("draw") / "record.json").exists()
    project.vico("run", *records)


def test_reused_shards_of_pictures_in_another_folder_are_said(project):
    rows, meta = project.folder / "rows.jsonl", project.folder / "meta.json"
    rows.write_text("{}\n")
    records = ("--set", f"inputs.records={{format: internvl, path: {meta}}}")

    def of_folder(name: str) -> tuple[str, ...]:
        (project.folder / name).mkdir(exist_ok=True)
        root = str(project.folder / name)
        meta.write_text(json.dumps({"a": {"root": root, "annotation": str(rows), "repeat_time": 1}}))
        return records

    project.vico("run", *of_folder("small"))
    assert project.plan(*of_folder("small"))["draw"][1][1:] == []
    [line] = project.plan(*of_folder("large"))["draw"][1][1:]
    assert f"read from {project.folder}/small, the config names {project.folder}/large" in line
    assert line in project.vico("run", *records) + project.errors, line


def test_a_file_swapped_for_one_of_equal_size_is_not_built_on(done):
    path = done.stage("draw") / "output" / "part-2.txt"
    path.write_bytes(path.read_bytes()[::-1])
    done.vico("run", "--set", "square.power=3", code=2)
    assert f"{path} is not what stage draw wrote" in done.errors and "--force draw" in done.errors
    assert len(list(done.storage.glob("square/*/attempts"))) == 1, "square did not begin"
    done.vico("run", "--set", "square.power=3", "--force", "draw")


def test_a_storage_that_becomes_read_only_is_named_and_half_written_parts_do_not_count(project):
    project.vico("run", code=1, TINY_FAIL="square:2", TINY_ERROR="EROFS")
    assert "square failed: OSError: [Errno 30] planted" in project.errors
    assert project.status()["state"] == "failed"
    assert not (project.stage("square") / "record.json").exists()
    project.vico("run")
    assert project.half_written() == []


@pytest.mark.parametrize("damage", ["{", '{"schema": 2}'])
def test_a_damaged_record_is_refused_until_forced(done, damage):
    path = done.stage("square") / "record.json"
    path.write_text(damage)
    action, (reason,) = done.plan()["square"]
    assert action == "run" and str(path) in reason
    before = done.outputs()
    done.vico("run", code=2)
    assert done.errors.splitlines() == [f"error: {reason}"]
    assert path.read_text() == damage
    done.vico("run", "--force", "square")
    assert done.outputs() == before
    assert (done.stage("square") / "superseded/1/record.json").read_text() == damage


def test_a_record_edited_by_hand_is_not_built_on(done):
    path = done.stage("square") / "record.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "counts": {"parts": 5}}))
    done.vico("run", "--set", "total.digits=3", code=2)
    (line,) = done.errors.splitlines()
    assert f"{path} was edited" in line and "--force square" in line
    path.write_text(json.dumps(content))
    done.vico("run", "--set", "total.digits=3")


def test_force_runs_a_stage_and_what_depends_on_it_again(done):
    before, first = done.outputs(), done.status()["run"]
    done.vico("run", "--force", "square")
    assert done.outputs() == before
    stages = {stage["name"]: stage for stage in done.status()["stages"]}
    assert {name: entry["reused"] for name, entry in stages.items()} == {
        "draw": True,
        "square": False,
        "total": False,
    }
    assert [stages[name]["attempt"] for name in ("draw", "square", "total")] == [1, 2, 2]
    assert done.status()["run"] != first
    assert (done.stage("square") / "superseded/1/record.json").exists()


def test_a_forced_run_that_was_killed_resumes_and_does_not_start_over(done):
    done.vico("run", "--force", "square", code=-9, TINY_KILL="square:2")
    done.vico("run", "--force", "square")
    assert not (done.stage("square") / "superseded/2").exists()
    assert done.record("square")["attempt"] == 3
    assert [attempt["state"] for attempt in done.status()["attempts"]] == ["interrupted", "done"]
    done.vico("run", "--force", "square")
    assert (done.stage("square") / "superseded/2").exists()


def test_until_runs_up_to_a_stage(project):
    output = json.loads(project.vico("run", "--until", "square", "--json"))
    assert output["state"] == "done"
    assert [entry["name"] for entry in project.status()["stages"]] == ["draw", "square"]
    assert not (project.storage / "total").exists()
    assert json.loads(project.vico("run", "--until", "square", "--json"))["run"] == output["run"]
    project.vico("run")
    stages = project.status()["stages"]
    assert [entry["reused_from"] for entry in stages] == [output["run"], output["run"], None]


def test_a_run_waiting_from_submission_is_picked_up(project):
    """`vico submit` writes a pending run of the same pipeline; the job's own `vico run` continues it."""
    project.vico("run", code=-9, VICO_DIE="before:draw")
    (run,) = project.runs()
    path = project.storage / "runs" / run / "run.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "state": "pending", "attempts": [], "submission": {"job": "j-1"}}))
    assert project.status()["state"] == "pending"
    project.vico("run")
    after = project.status()
    assert (after["run"], after["state"], after["submission"]) == (run, "done", {"job": "j-1"})


def test_the_state_of_a_run_resumed_outside_its_job_no_longer_depends_on_the_job(project):
    """The job ended, and `vico run` by hand resumes its run. Within the job, the submission is kept."""
    project.vico("run", code=1, TINY_FAIL="square:1")
    (run,) = project.runs()
    path = project.storage / "runs" / run / "run.json"
    submission = {"kind": "ray-jobs", "address": "http://127.0.0.1:1", "id": "vico-1"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "submission": submission}))
    project.vico("run", code=1, TINY_FAIL="square:2", VICO_JOB=json.dumps(submission))
    assert project.status()["submission"] == submission
    process, go = project.pause("square:3")
    assert (project.status()["state"], project.status()["submission"]) == ("running", None)
    go.touch()
    assert process.wait(PATIENCE_S) == 0


def test_a_resumed_run_has_the_paths_and_the_experiment_of_the_new_command(project):
    project.vico("run", code=1, TINY_FAIL="square:1")
    project.vico("run", "--set", "inputs.model=moved", "--set", "experiment=other")
    (run,) = project.runs()
    stored = json.loads((project.storage / "runs" / run / "run.json").read_text())
    assert stored["config"]["inputs"]["model"] == str(project.folder / "moved")
    assert stored["config"]["experiment"] == stored["experiment"] == "other"


def test_status_and_logs_are_for_people_and_programs(done):
    status = done.status()
    assert set(status) >= {"run", "state", "stages"}
    for stage in status["stages"]:
        assert set(stage) >= {
            "name",
            "state",
            "fingerprint",
            "attempt",
            "seconds",
            "reused",
            "path",
            "mlflow_run_id",
        }
        assert stage["path"] == str(done.stage(stage["name"]) / "output")
    assert "total   done" in done.vico("status", "latest")
    assert "3 of 3 done" in done.vico("status")
    log = done.vico("logs", "latest", "-f")
    assert "draw: starts, attempt 1" in log and "run " in log.splitlines()[-1]
    assert "total: done in" in done.vico("logs", status["run"][:-2], "--stage", "total")


def test_nothing_but_the_answer_is_on_standard_output(project):
    output = project.vico("run", "--json")
    assert list(json.loads(output)) == ["run", "state", "storage"]
    assert "draw: starts" in project.errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--set", "drew.scale=1"], "unknown key drew; did you mean draw?"),
        (["run", "--set", "draw.scale=big"], "draw.scale='big' is not a number"),
        (
            ["run", "--force", "squares"],
            "--force='squares' is not a stage; the stages are draw, square, total",
        ),
        (["plan", "--until", "totals"], "--until='totals' is not a stage"),
        (["run", "--set", "inputs.records={format: internvl, path: no.json}"], "no.json"),
        (["status", "nope"], "there are no runs in"),
        (["logs", "latest"], "there are no runs in"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(project, arguments, message):
    project.vico(*arguments, code=2)
    (line,) = project.errors.splitlines()
    assert line.startswith("error: ") and message in line
    assert not project.storage.exists()


def test_a_storage_that_is_a_file_is_refused(project):
    project.storage.write_text("")
    project.vico("run", code=2)
    assert project.errors == f"error: storage={project.storage} is a file; name a folder with --storage\n"


def test_a_missing_config_is_refused(project):
    (project.folder / "pipeline.yaml").unlink()
    project.vico("run", code=2)
    assert "pipeline.yaml does not exist" in project.errors


def test_metrics_and_records_are_on_disk(done):
    lines = (done.stage("draw") / "attempts/1/metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3]
    assert set(entries[0]) == {"step", "time", "metrics"} and "length" in entries[0]["metrics"]
    record = done.record("square")
    assert record["identity"]["inputs"] == {"draw": done.record("draw")["fingerprint"]}
    assert record["inputs"] == {"draw": done.record("draw")["output_digest"]}
    assert record["packages"]["pydantic"] and record["facts"]["resources"]["workers"] == 2
    assert record["counts"] == {"parts": 4} and record["site"] == "tiny"


def test_metrics_that_tracking_lacks_after_an_outage_are_sent_by_the_same_command(project):
    (project.folder / "site.yaml").write_text("name: tiny\ntracking: {finish_timeout_s: 300}\n")
    project.vico("run")
    (sent,) = project.storage.glob("runs/*/mlflow.json")
    complete = json.loads(sent.read_text())
    assert complete["complete"]
    sent.write_text(json.dumps({**complete, "complete": False}))
    assert "MLflow now has all of it" in project.vico("run")
    assert json.loads(sent.read_text())["complete"]
    assert "tracking" not in project.vico("run")


def other_versions(folder: Path, **versions: str) -> str:
    """Return a PYTHONPATH on which these packages are installed in other versions."""
    for name, other in versions.items():
        metadata = folder / f"{name}-{other}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {other}\n")
    return f"{ROOT}{os.pathsep}{folder}"


def test_packages_that_change_between_attempts_are_said_and_recorded(project, tmp_path):
    """The stage imports pydantic and not torch: both are said and kept, pydantic counts for --strict-code."""
    pydantic, torch = version("pydantic"), version("torch")
    upgraded = other_versions(tmp_path / "upgraded", torch="99.1", pydantic="99.0")
    project.vico("run", code=-9, TINY_KILL="square:2")
    assert json.loads((project.stage("square") / "attempts/1/attempt.json").read_text())["packages"]
    changes = f"pydantic {pydantic} -> 99.0, torch {torch} -> 99.1"
    resumes = f"unfinished: resumes from attempt 1; {changes} changed since, and its parts are kept"
    assert resumes in project.vico("run", PYTHONPATH=upgraded)
    record = project.record("square")
    assert record["facts"]["packages_of_attempts"] == {"1": {"pydantic": pydantic, "torch": torch}}
    assert (record["packages"]["pydantic"], record["packages"]["torch"]) == ("99.0", "99.1")

    audit = project.vico("audit", "latest", PYTHONPATH=upgraded)
    assert f"made by attempts of different packages (attempt 1: {changes})" in " ".join(audit.split())
    planned = json.loads(project.vico("plan", "--json", PYTHONPATH=upgraded))
    mixed = f"made by attempts of different packages (attempt 1: pydantic {pydantic} -> 99.0)"
    assert planned[1]["reasons"][1] == f"{mixed}; fingerprint kept, code_version 1"
    first = project.runs()[0]
    project.vico("run", "--force", "square", PYTHONPATH=upgraded)
    assert "packages_of_attempts" not in project.record("square")["facts"]
    differences = json.loads(project.vico("diff", first, "latest", "--json"))["packages"]
    assert {"stage": "square", "name": "torch in attempt 1", "a": torch, "b": None} in differences


def test_a_reused_result_of_other_packages_is_said(done, tmp_path):
    """It is made again with --strict-code; packages that the stage does not import do not count."""
    pydantic = version("pydantic")
    upgraded = other_versions(tmp_path / "upgraded", torch="99.1", pydantic="99.0")
    changed = f"pydantic {pydantic} -> 99.0 changed since"
    planned = json.loads(done.vico("plan", "--json", PYTHONPATH=upgraded))
    assert planned[1]["reasons"][1] == f"{changed}; fingerprint kept, code_version 1"
    planned = json.loads(done.vico("plan", "--json", "--strict-code", PYTHONPATH=upgraded))
    assert planned[0]["reasons"] == [f"{changed} (--strict-code)"]
    others = other_versions(tmp_path / "others", torch="99.1")
    planned = json.loads(done.vico("plan", "--json", "--strict-code", PYTHONPATH=others))
    assert [stage["action"] for stage in planned] == ["reuse"] * 3
