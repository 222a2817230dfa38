"""The base of all stage configs: frozen, without unknown keys, nan or inf."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class StageConfig(BaseModel):
    """The config of one stage; all of its fields enter the stage's fingerprint.

    A stage that draws random numbers has the field `seed: int`. A pipeline file may leave it out; the stage
    then uses the pipeline's seed.
    """

    LEFT_OUT: ClassVar[Mapping[str, Any]] = {}
    """Field -> the value that a fingerprint leaves out, of fields whose default has changed since. Of all
    others it is the default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
