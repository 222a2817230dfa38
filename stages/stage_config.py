"""What the configs of all stages share: frozen, no unknown key, no nan or inf."""

from pydantic import BaseModel, ConfigDict


class StageConfig(BaseModel):
    """The config of one stage; all of its fields enter the stage's fingerprint.

    A stage that draws random numbers has the field `seed: int | None = None`; None stands for the pipeline's
    seed and is replaced by it before the config is hashed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
