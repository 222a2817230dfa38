"""What the stages ratio and evaluate will take on GPUs, before they ever ran."""

from dataclasses import dataclass

from cluster.site import Site
from pipeline.planning.fitting import USABLE
from pipeline.terminal.progress import duration
from stages.evaluate.config import EvaluateConfig
from stages.ratio.config import RatioConfig
from stages.stage_config import StageConfig
from vico.memory.model_sizes import ModelSizes
from vico.memory.speed import SAMPLE_TOKENS, ratio_seconds


@dataclass(frozen=True)
class InferenceEstimate:
    """Most samples of a stage (None: all, `max_samples` is 0), and the time of 1,000 on one GPU (None:
    not computed)."""

    num_samples: int | None
    seconds_per_1000: float | None
    num_actors: int
    what: str
    refusal: str | None = None
    """Why the stage is refused, with a remedy; None if the weights fit, or if the site does not state the
    memory of its GPUs."""

    def lines(self, *, measured: bool = False) -> list[str]:
        """Return the estimate for `vico plan`, without samples and time if the stage was measured."""
        return [
            *([] if measured else self._samples()),
            *([f"refused: {self.refusal}"] if self.refusal else []),
        ]

    def _samples(self) -> list[str]:
        many = "all samples" if self.num_samples is None else f"at most {self.num_samples:,} samples"
        if self.seconds_per_1000 is None:
            return [f"{many}{self.what}"]
        text = f"{many}{self.what}: about {duration(self.seconds_per_1000)} of one GPU per 1,000"
        if self.num_samples is not None:
            seconds = self.seconds_per_1000 * self.num_samples / 1000 / self.num_actors
            text += f", {duration(seconds)} in all with {self.num_actors} actors on a GPU each"
        return [f"{text} (computed, for samples of {SAMPLE_TOKENS} tokens)"]


def inference_estimate(
    stage: str, config: StageConfig, sizes: ModelSizes, site: Site
) -> InferenceEstimate | None:
    """Return the estimate of a stage `ratio` or `evaluate` that uses GPUs; None for another stage, or on
    CPUs."""
    of_stage = site.for_stage(stage)
    resources, peak = of_stage.resources, of_stage.train.profiling.peak_tflops
    if not resources.gpus_per_worker:
        return None
    actors = max(1, round(resources.actors * resources.gpus_per_worker))  # several may share a GPU
    refusal = None
    if isinstance(config, RatioConfig | EvaluateConfig):
        weight_bytes = 4 if config.dtype == "float32" else 2
        refusal = _refusal(stage, weight_bytes * (sizes.policy + sizes.base), site)
    if isinstance(config, RatioConfig):
        seconds = None
        if peak is not None:
            passes = config.masks + 1 if config.isolation == "random" else None
            seconds = 1000 * ratio_seconds(sizes, peak, passes)
        budgets = [config.budget(split)[1] for split in config.splits]
        most = sum(budgets) if all(budgets) else None
        return InferenceEstimate(most, seconds, actors, f" in {len(config.splits)} splits", refusal)
    if isinstance(config, EvaluateConfig):
        points = 3 + (len(config.shares) + 1) * (1 + len(config.controls))
        return InferenceEstimate(
            config.max_samples or None, None, actors, f", answered at about {points} points", refusal
        )
    return None


def _refusal(stage: str, weights: int, site: Site) -> str | None:
    """Return why the weights of policy and reference, in bytes, do not fit a GPU as often as actors share it;
    None if they do. What the actors need besides is not counted."""
    resources = site.for_stage(stage).resources
    if resources.gpu_memory_gb is None:
        return None
    usable = USABLE * resources.gpu_memory_gb * 1e9
    sharing = max(1, int(1 / resources.gpus_per_worker + 1e-6))
    fitting = int(usable // weights)
    if sharing <= fitting:
        return None
    own = f"resources.stages.{stage}"
    if fitting:
        actors = max(1, int(resources.actors * resources.gpus_per_worker * fitting + 1e-6))
        remedy = f"set {own}.gpus_per_worker: {1 / fitting:.3g}, {own}.actors: {actors}"
    else:
        least = weights / USABLE / 1e9
        remedy = (
            f"take GPUs with at least {least:.0f} GB ({own}.nodes, {own}.gpu_memory_gb), or stop before it"
        )
        remedy += " with --until consistency"
    field = site.resources.field_of(stage, "gpu_memory_gb")
    of_many = f"of each of {sharing} actors per GPU " if sharing > 1 else ""
    return (
        f"{stage} needs {sharing * weights / 1e9:.1f} GB of GPU memory for policy and reference {of_many}"
        f"alone, and {field}={resources.gpu_memory_gb:g} leaves {usable / 1e9:.1f} GB; {remedy}"
    )
