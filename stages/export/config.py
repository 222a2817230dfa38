"""The config of the export stage."""

from stages.stage_config import StageConfig


class ExportConfig(StageConfig):
    """The exported model; it has no settings yet."""
