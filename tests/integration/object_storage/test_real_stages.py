"""Stages of the real pipeline on an object store."""

import json
import shutil
import signal

import pyarrow.parquet
import pytest
import yaml

from tests.integration.demo_pipeline import STAGES as STAGES_OF_VICO
from tests.integration.demo_pipeline import finished, vico

PLACES = ("before", "middle", "unrecorded", "recorded")


def test_a_real_stage_gives_the_same_bytes_as_on_a_disk(pipeline, outputs, machine):
    """The label stage of the real pipeline, on adopted ratios; killed three times and each time resumed
    from an empty working copy."""
    project = machine()
    write_real(project, pipeline, outputs, ("shard", "consistency", "ratio"))
    for place in PLACES[1:]:
        run_real(project, "label", f"{place}:label", code=-signal.SIGKILL)
        project.forget()
    run_real(project, "label")
    assert outputs_of("label", project) == contents(outputs["label"])


def test_export_audited_samples_and_a_recipe_are_read_from_the_store(pipeline, outputs, machine):
    """All stages are adopted; then the working copy is removed."""
    project = machine()
    write_real(project, pipeline, outputs, STAGES_OF_VICO)
    run_real(project, "export")
    project.forget()
    real(project, "export", "latest", "model", "--layout", "hf")
    exported, stored = project.folder / "model", outputs["export"] / "model"
    assert (exported / "model.safetensors").read_bytes() == (stored / "model.safetensors").read_bytes()
    index = pyarrow.parquet.read_table(outputs["label"] / "labels.parquet", columns=["key"])
    sample = json.loads(real(project, "audit", "latest", "--sample", str(index["key"][0]), "--json"))
    assert sample["labels"], "the row of the table"
    recipe = json.loads(real(project, "reproduce", "latest", "--out", "again.yaml", "--json"))
    assert recipe["command"].startswith("vico run ")


def real(project, *arguments):
    options = {"cwd": project.folder, "extra_environment": project.environment}
    code, output, errors = finished(
        vico(*arguments, "--site", "site.yaml", "--storage", project.address, **options)
    )
    assert code == 0, errors[-2000:]
    return output


@pytest.mark.slow  # starts Ray twice
def test_a_training_resumes_on_another_machine_from_the_checkpoint_in_the_store(pipeline, outputs, machine):
    first, second = machine("a"), machine("b")
    for project in (first, second):
        write_real(project, pipeline, outputs, ("shard",))
    run_real(first, "consistency", "stored:consistency", code=-signal.SIGKILL)
    shutil.rmtree(first.folder)
    run_real(second, "consistency")
    assert outputs_of("consistency", second) == contents(outputs["consistency"])
    log = (second.stage("consistency") / "attempts" / "2" / "rank-0.log").read_text()
    assert "resuming from step" in log
    objects = second.objects()
    assert not any(key.startswith("parts/consistency") and "mp_rank" in key for key in objects)
    assert json.loads(second.vico("gc", "--dry-run", "--json"))["removed"] == []


def write_real(project, pipeline, outputs, adopted):
    """Write the real pipeline's config file, with adopted results."""
    content = yaml.safe_load(pipeline[0].read_text())
    content["inputs"]["adopt"] = {stage: str(outputs[stage]) for stage in adopted}
    (project.folder / "real.yaml").write_text(yaml.safe_dump(content))
    project.site("train: {checkpoints: {every_steps: 3}}\n")


def run_real(project, until, dies="", code=0):
    command = ["run", "real.yaml", "--until", until, "--site", "site.yaml", "--storage", project.address]
    process = vico(
        *command, dies=dies or "nowhere", cwd=project.folder, extra_environment=project.environment
    )
    exit_code, output, errors = finished(process)
    assert exit_code == code, (output[-2000:], errors[-2000:])


def outputs_of(stage, project):
    stored = project.stored_outputs().items()
    return {name.partition("/output/")[2]: data for name, data in stored if name.startswith(f"{stage}/")}


def contents(output):
    files = [path for path in output.rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}
