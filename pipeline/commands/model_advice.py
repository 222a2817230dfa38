"""What `vico init --model` says of a model by its config.json: whether it can be trained, and with what."""

from dataclasses import dataclass

from pipeline.commands.project_template import Budget
from pipeline.planning.setups import MOST_GPUS, PACKS, Setup, smallest_setup
from pipeline.planning.without_weights import known_config_folder
from stages.consistency.config import ConsistencyConfig
from stages.consistency.rate_rule import rate_by_rule
from vico.errors import UserError
from vico.memory.model_sizes import ModelSizes, model_sizes
from vico.model_files import model_config, refuse_outside_links

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

    @property
    def headline(self) -> str:
        """What the model is, and whether and on how many GPUs it can be trained."""
        head = (
            f"{self.model}: InternVL with {self.kind}, {_count(self.sizes.base)} parameters: can be trained"
        )
        if self.is_small:
            return head
        if self.setup is None:
            return f"{head}, on more than {MOST_GPUS} GPUs of 80 GB"
        gpus = "1 GPU" if self.setup.num_gpus == 1 else f"{self.setup.num_gpus} GPUs"
        return f"{head}, on {gpus} of 80 GB or more (computed, not measured) with this site file:"

    def site(self) -> list[str]:
        """Return the lines of a site file for the model; empty if it needs none, or none is known."""
        return [] if self.is_small or self.setup is None else self.setup.site()

    def budget(self) -> Budget:
        """Return what the trainings of the pipeline file need for the model."""
        if self.is_small:
            return Budget()
        tiles, tokens = PACKS[-1]
        ranks = 2 * MOST_GPUS
        if self.setup is not None:
            tiles, tokens, ranks = self.setup.tiles_per_pack, self.setup.tokens_per_pack, self.setup.num_gpus
        # As many tokens per update for every model, and a pack for every rank.
        packs = max(8 * PACKS[0][1] // tokens, ranks)
        config = ConsistencyConfig(seed=0, packs_per_step=packs, reference_tokens_per_pack=tokens)
        pack = {"tiles_per_pack": tiles, "reference_tokens_per_pack": tokens}
        return Budget(packs, max(8, ranks), rate_by_rule(config), pack, in_bfloat16=True)


def model_advice(model: str) -> ModelAdvice:
    """Return the advice for a model folder or Hub id, of which at most the config is fetched.

    Raises UserError if the model does not exist or cannot be trained.
    """
    folder = known_config_folder(model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model {model} is not a folder with a config.json; give the folder or Hub id of an InternVL "
            "checkpoint"
        )
    refuse_outside_links(folder)
    config = model_config(folder)
    sizes = model_sizes(config)
    setup = None if sizes.base < _SMALL else smallest_setup(sizes)
    return ModelAdvice(model, str(config["text_config"]["model_type"]), sizes, setup)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 10**9 else f"{parameters / 1e6:.1f}M"
