"""What `vico init --model` says of a model by its config.json: whether it can be trained, and with what."""

from dataclasses import dataclass

from pipeline.planning.setups import Setup, smallest_setup
from vico.checkpoints.hub import config_folder
from vico.errors import UserError
from vico.memory.model_sizes import ModelSizes, model_sizes
from vico.model_files import model_config

_SMALL = 10**8
"""Parameters below which a model trains on CPUs, with the budgets of any pipeline file."""


@dataclass(frozen=True)
class ModelAdvice:
    """A model that can be trained: its sizes, and the smallest setup of 80 GB GPUs for one that needs any."""

    model: str
    kind: str
    sizes: ModelSizes
    setup: Setup | None

    @property
    def is_small(self) -> bool:
        return self.sizes.base < _SMALL

    def lines(self) -> list[str]:
        """Return what is shown to the user."""
        head = (
            f"{self.model}: InternVL with {self.kind}, {_count(self.sizes.base)} parameters: can be trained"
        )
        if self.is_small:
            return [head]
        if self.setup is None:
            return [f"{head}, on more than 64 GPUs of 80 GB"]
        count = self.setup.num_gpus
        plural = "GPUs" if count > 1 else "GPU"
        site = ["  " + line for line in self.setup.site().splitlines()]
        return [f"{head}, from {count} {plural} of 80 GB on (computed, not measured) with a site of:", *site]

    def consistency(self) -> dict[str, object]:
        """Return keys of the consistency block that suit the model; empty if the defaults do."""
        if self.is_small or self.setup is None:
            return {}
        return {
            "tiles_per_pack": self.setup.tiles_per_pack,
            "reference_tokens_per_pack": self.setup.tokens_per_pack,
        }


def model_advice(model: str) -> ModelAdvice:
    """Return the advice for a model folder or Hub id, of which only the config is fetched.

    Raises UserError if the model does not exist or cannot be trained.
    """
    folder = config_folder(model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model {model} is not a folder with a config.json; give the folder or Hub id of an InternVL "
            "checkpoint"
        )
    config = model_config(folder)
    sizes = model_sizes(config)
    setup = None if sizes.base < _SMALL else smallest_setup(sizes)
    return ModelAdvice(model, str(config["text_config"]["model_type"]), sizes, setup)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 10**9 else f"{parameters / 1e6:.1f}M"
