"""What an audit read of a run, file by file and value by value: what a seal keeps."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.json_files import OutputFile


@dataclass
class Facts:
    """The content of a run as the audit saw it. All values are JSON types."""

    files: dict[str, OutputFile] = field(default_factory=dict)
    """`STAGE/output/NAME` or `STAGE/attempts/N/NAME` -> size and sha256."""
    records: dict[str, Any] = field(default_factory=dict)
    """Stage -> content of its record.json."""
    run: dict[str, Any] = field(default_factory=dict)
    """What run.json says of the run's identity; not its commands, of which every `vico run` adds one."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Source (records, model) -> its digest now."""
    mlflow: dict[str, Any] = field(default_factory=dict)
    """Stage (or `pipeline`) -> id, status, params, tags, data sets and metrics of its MLflow run."""
