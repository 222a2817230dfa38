"""The block `quality_gate` of the pipeline file: what its model must reach. It enters no fingerprint."""

from pydantic import BaseModel, ConfigDict, Field


class QualityGate(BaseModel):
    """What the measured model must reach to become the candidate in MLflow's model registry.

    A model that does not reach it is exported all the same, with a warning; `vico run --accept` makes it the
    candidate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_questions: int = Field(100, ge=1)
    """Fewest test questions that the quality may be measured on."""
    min_kept: float = Field(0.9, ge=0)
    """Smallest quality kept at the calibrated threshold: similarity divided by the start model's."""
