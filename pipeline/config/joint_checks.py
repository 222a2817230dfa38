"""Checks that need several blocks of a config, or config and site. They run before anything starts."""

from cluster.site import Site
from pipeline.config.pipeline_file import PipelineConfig
from stages.stage_config import StageConfig
from vico.errors import UserError


def check_together(config: PipelineConfig, site: Site) -> None:
    """Raise UserError if a training would have more ranks than packs per step, if the site has resources for
    a stage that does not exist, or if the oracle control of the evaluation lacks the ratio of a test tile."""
    _check_stages_exist(config, site)
    _check_ranks_have_packs(config, site)
    _check_oracle_has_ratios(config)


def _check_ranks_have_packs(config: PipelineConfig, site: Site) -> None:
    """Every rank of a training needs at least one pack per step; with none it would have nothing to do."""
    for name, block in config:
        packs_per_step = getattr(block, "packs_per_step", None)
        num_ranks = site.resources.of_stage(name).workers
        if packs_per_step is not None and num_ranks > packs_per_step:
            own = site.resources.stages.get(name)
            has_own = own is not None and own.workers is not None
            field = f"resources.stages.{name}.workers" if has_own else "resources.workers"
            raise UserError(
                f"{field}={num_ranks} (site {site.name}) is more than "
                f"{name}.packs_per_step={packs_per_step}; "
                f"lower {field} or raise {name}.packs_per_step"
            )


def _check_stages_exist(config: PipelineConfig, site: Site) -> None:
    """Resources of a stage that does not exist would never take effect."""
    stages = [name for name, block in config if isinstance(block, StageConfig)]
    for name in site.resources.stages:
        if name not in stages:
            raise UserError(
                f"resources.stages.{name} (site {site.name}) is not a stage; known: {', '.join(stages)}"
            )


def _check_oracle_has_ratios(config: PipelineConfig) -> None:
    ratio, evaluate = getattr(config, "ratio", None), getattr(config, "evaluate", None)
    controls = getattr(evaluate, "controls", ())
    named = [name for name in ("oracle", "blind_oracle") if name in controls]
    if ratio is None or evaluate is None or not named:
        return
    fewer_samples = 0 < evaluate.max_samples <= ratio.max_samples and evaluate.seed == ratio.seed
    if "test" not in ratio.splits or (ratio.max_samples and not fewer_samples):
        raise UserError(
            f"evaluate.controls names {' and '.join(named)}, "
            "which needs the ratios of all tiles that evaluate measures, but "
            f"ratio.splits={','.join(ratio.splits)} and ratio.max_samples={ratio.max_samples} (per split, "
            f"drawn by ratio.seed={ratio.seed}) leave out some of the {evaluate.max_samples or 'all'} "
            f"samples of evaluate.max_samples={evaluate.max_samples} "
            f"(drawn by evaluate.seed={evaluate.seed}); "
            f"take {' and '.join(named)} out of evaluate.controls, or let ratio cover the test split "
            "(ratio.max_samples=0)"
        )
