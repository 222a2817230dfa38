"""Whether a training fits the GPUs of its site, and which settings would make it fit."""

from dataclasses import dataclass

from cluster.settings.blocks import NodeGroup
from cluster.settings.rules import num_places
from cluster.site import Site
from pipeline.planning.remedies import Training, remedies
from vico.memory.training_memory import RankMemory, TrainingShape, rank_memory

USABLE = 0.9
"""Share of a GPU's memory for what is computed here; the rest is for CUDA, NCCL and fragments."""


@dataclass(frozen=True)
class Fit:
    """A training that was compared with the memory of a GPU."""

    memory: RankMemory
    usable_bytes: float | None
    """None: the site does not state the memory of its GPUs."""
    remedy: str | None
    """The settings that would make it fit, with the memory then; None: it fits, or nothing would."""

    @property
    def fits(self) -> bool:
        return self.usable_bytes is None or self.memory.device <= self.usable_bytes

    def refusal(self, stage: str, field: str) -> str | None:
        """Return why the stage is refused; None if it fits. `field` is the site's field of the memory."""
        if self.fits or self.usable_bytes is None:
            return None
        gpu = self.usable_bytes / USABLE / 1e9
        remedy = self.remedy or "no setting would make it fit; take GPUs with more memory"
        return (
            f"{stage} needs about {self.memory.device / 1e9:.1f} GB of GPU memory per rank at a full pack, "
            f"and {field}={gpu:g} leaves {self.usable_bytes / 1e9:.1f} GB; {remedy}"
        )


def compared(training: Training, shape: TrainingShape) -> Fit:
    """Return how a training of this shape fits the GPUs of its site."""
    resources = training.site.resources
    memory, gpu_gb = rank_memory(training.sizes, shape), resources.gpu_memory_gb
    if gpu_gb is None or not resources.gpus_per_worker:
        return Fit(memory, None, None)
    usable = USABLE * gpu_gb * 1e9
    return Fit(memory, usable, None if memory.device <= usable else _remedy(training, shape, usable))


def _remedy(training: Training, shape: TrainingShape, usable_bytes: float) -> str | None:
    for remedy in remedies(training, shape):
        memory = rank_memory(training.sizes, remedy.shape)
        if memory.device <= usable_bytes and _fits_host(memory, remedy.shape, training.site):
            return f"set {', '.join(remedy.settings)} (about {memory.device / 1e9:.1f} GB then)"
    return None


def _fits_host(memory: RankMemory, shape: TrainingShape, site: Site) -> bool:
    """Return whether what the ranks of a node move to host memory fits, if the site states its size."""
    groups = [group for group in site.nodes if site.resources.nodes in (None, group.name)]
    moves = shape.offload != "none" or shape.reference == "cpu"
    if not moves or not groups:
        return True
    on_node = min(shape.num_ranks, max(_places(group, site) for group in groups))
    return all(
        group.memory_gib is None or on_node * memory.host <= USABLE * group.memory_gib * 2**30
        for group in groups
    )


def _places(group: NodeGroup, site: Site) -> int:
    """Return how many ranks one node of the group takes."""
    return num_places(site.resources, [group.model_copy(update={"count": 1})])
