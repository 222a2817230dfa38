"""A rank does not import MLflow, which DeepSpeed would."""

import subprocess
import sys


def test_ranks_import_deepspeed_without_mlflow():
    code = (
        "import sys, stages.training.engine\n"
        "print('mlflow' in sys.modules)\n"
        "import mlflow\n"
        "print(mlflow.version.VERSION)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    absent, version = done.stdout.split()[-2:]
    assert absent == "False" and version[0].isdigit()
