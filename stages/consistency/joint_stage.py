"""The joint training: consistency training continues from the first policy at the rates of its router.

It runs the code of the consistency stage. It starts from the policy's weights with a new optimizer state:
the first training ends with a learning rate near 0 and keeps no checkpoint, and its moments belong to other
rates. The reference stays the frozen start model.
"""

from stages.consistency import stage as first
from stages.consistency.config import JointConsistencyConfig
from stages.context import Context
from stages.outputs import POLICY_FOLDER

CODE_VERSION = first.CODE_VERSION
INPUTS = ("shard", "model", "consistency", "rates")
NEEDS_RAY = True
Config = JointConsistencyConfig


def run(config: JointConsistencyConfig, context: Context) -> dict[str, float | int | str]:
    """Publish what the consistency stage does: `policy/` and `curve.parquet`; return the last metrics."""
    from stages.consistency.packs import ConsistencySettings, JointInputs

    settings = ConsistencySettings(
        config=config,
        shard_folder=context.folder("shard"),
        model_folder=context.folder("model"),
        parts=context.parts,
        train=context.site.train,
        joint=JointInputs(context.folder("consistency") / POLICY_FOLDER, context.folder("rates")),
    )
    return first.run_training(settings, context)
