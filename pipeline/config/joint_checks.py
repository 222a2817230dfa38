"""Checks that need several blocks of a config, or config and site. They run before anything starts."""

from cluster.site import Site
from pipeline.config.pipeline_file import PipelineConfig
from vico.errors import Faults, UserError


def check_together(config: PipelineConfig, site: Site) -> None:
    """Raise UserError if a training would have more ranks than packs per step, or if the oracle control of
    the evaluation lacks the ratio of a test tile."""
    faults = Faults()
    for check in (lambda: _check_ranks_have_packs(config, site), lambda: _check_oracle_has_ratios(config)):
        with faults.collected():
            check()
    faults.raise_all()


def _check_ranks_have_packs(config: PipelineConfig, site: Site) -> None:
    """Every rank of a training needs at least one pack per step; with none it would have nothing to do."""
    num_ranks = site.resources.workers
    packs = {
        f"{name}.packs_per_step": block.packs_per_step
        for name, block in config
        if getattr(block, "packs_per_step", num_ranks) < num_ranks
    }
    if packs:
        fields = " and ".join(f"{field}={value}" for field, value in packs.items())
        raise UserError(
            f"resources.workers={num_ranks} (site {site.name}) is more than {fields}: every rank needs a "
            f"pack per step; set resources.workers to {min(packs.values())} or less, or "
            f"{' and '.join(packs)} to {num_ranks} or more"
        )


def _check_oracle_has_ratios(config: PipelineConfig) -> None:
    ratio, evaluate = getattr(config, "ratio", None), getattr(config, "evaluate", None)
    if ratio is None or evaluate is None or "oracle" not in getattr(evaluate, "controls", ()):
        return
    fewer_samples = 0 < evaluate.max_samples <= ratio.max_samples and evaluate.seed == ratio.seed
    if "test" not in ratio.splits or (ratio.max_samples and not fewer_samples):
        raise UserError(
            "evaluate.controls names oracle, which needs the ratios of all tiles that evaluate measures, but "
            f"ratio.splits={','.join(ratio.splits)} and ratio.max_samples={ratio.max_samples} (per split, "
            f"drawn by ratio.seed={ratio.seed}) leave out some of the {evaluate.max_samples or 'all'} "
            f"samples of evaluate.max_samples={evaluate.max_samples} "
            f"(drawn by evaluate.seed={evaluate.seed}); "
            "take oracle out of evaluate.controls, or let ratio cover the test split (ratio.max_samples=0)"
        )
