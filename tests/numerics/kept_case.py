"""One rank that makes consistency trainings with a frozen vision tower, one scenario after another.

`python -m tests.numerics.kept_case FOLDER SCENARIO...`; FOLDER is made by `router_case.write_case`. A
scenario is a JSON object: `name` (folder of the stage), `attempt`, `config` (fields of ConsistencyConfig),
`site` (blocks of the site's `train` settings).
"""

import json
import sys
from pathlib import Path

import torch

from cluster.train_settings import TrainSettings
from stages.consistency.config import ConsistencyConfig
from stages.consistency.packs import ConsistencySettings
from stages.parts import Parts
from tests.numerics.router_case import MODEL


def settings_of(folder: Path, scenario: dict) -> ConsistencySettings:
    config = {
        "seed": 5,
        "train_vision": False,
        "optimizer": {"learning_rate": 1e-4},
        "tiles_per_pack": 32,
        "reference_tokens_per_pack": 1024,
        "packs_per_step": 3,  # on two ranks, one of them has an empty pack in every step
        "epochs": 2,
        "max_steps": 4,  # a pass has three
        "validate_every_steps": 2,
        **scenario.get("config", {}),
    }
    site = {"checkpoints": {"every_steps": 2}, **scenario.get("site", {})}
    return ConsistencySettings(
        config=ConsistencyConfig.model_validate(config),
        shard_folder=folder / "shards",
        model_folder=MODEL,
        parts=Parts(folder / scenario["name"], scenario.get("attempt", 1)),
        train=TrainSettings.model_validate(site),
    )


if __name__ == "__main__":
    from stages.consistency.worker import train_policy

    torch.set_num_threads(1)
    for text in sys.argv[2:]:
        train_policy(settings_of(Path(sys.argv[1]), json.loads(text)))
    torch.distributed.destroy_process_group()  # otherwise its threads still run when the process ends
