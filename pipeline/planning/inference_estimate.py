"""What the stages ratio and evaluate will take on GPUs, before they ever ran."""

from dataclasses import dataclass

from cluster.site import Site
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

    def lines(self) -> list[str]:
        """Return the estimate for `vico plan`."""
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
    if isinstance(config, RatioConfig):
        seconds = None
        if peak is not None:
            passes = config.masks if config.isolation == "random" else None
            seconds = 1000 * ratio_seconds(sizes, peak, passes)
        budgets = [config.budget(split)[1] for split in config.splits]
        most = sum(budgets) if all(budgets) else None
        return InferenceEstimate(most, seconds, actors, f" in {len(config.splits)} splits")
    if isinstance(config, EvaluateConfig):
        points = 3 + (len(config.shares) + 1) * (1 + len(config.controls))
        return InferenceEstimate(
            config.max_samples or None, None, actors, f", answered at about {points} points"
        )
    return None
