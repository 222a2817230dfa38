"""DeepSpeed without MLflow: import it from here.

DeepSpeed's autotuner, which nothing here uses, imports MLflow if it is installed. That costs each rank
2 seconds and 90 MB (measured). MLflow is hidden only while DeepSpeed is imported.
"""

import sys

_HIDES_MLFLOW = "mlflow" not in sys.modules
if _HIDES_MLFLOW:
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # an import of it raises ImportError
try:
    import deepspeed
finally:
    if _HIDES_MLFLOW:
        del sys.modules["mlflow"]

__all__ = ["deepspeed"]
