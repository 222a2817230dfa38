"""Listing the samples of a step does not load the training."""

import subprocess
import sys

PROGRAM = """
import sys
import pipeline.audit.samples, stages.consistency.packs, stages.router.packs
print(sorted({"deepspeed", "ray", "mlflow"} & sys.modules.keys()))
"""


def test_the_packs_of_a_training_are_imported_without_deepspeed_ray_and_mlflow():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
