"""Checks that need several blocks of a config, or config and site. They run before anything starts."""

from cluster.site import Site
from pipeline.config.graph import JOINT, JOINT_STAGES, block_path
from pipeline.config.pipeline_file import PipelineConfig
from stages.evaluate.config import EvaluateConfig
from stages.ratio.config import RatioConfig
from vico.errors import Faults, UserError


def check_together(config: PipelineConfig, site: Site) -> None:
    """Raise UserError if a training would have more ranks than packs per step, if the site has resources for
    a stage that does not exist, or if the oracle control of the evaluation lacks the ratio of a test tile."""
    faults = Faults()
    for check in (_check_stages_exist, _check_ranks_have_packs):
        with faults.collected():
            check(config, site)
    with faults.collected():
        _check_oracle_has_ratios(config)
    faults.raise_all()


def most_ranks(config: PipelineConfig, site: Site, stage: str) -> int:
    """Return the most ranks of a training with which `check_together` lets it and the other trainings pass
    that have their number of ranks from the same field of the site."""
    field = site.resources.field_of(stage, "workers")
    return min(
        packs
        for name, block in config.stage_configs()
        if isinstance(packs := getattr(block, "packs_per_step", None), int)
        and site.resources.field_of(name, "workers") == field
    )


def _check_ranks_have_packs(config: PipelineConfig, site: Site) -> None:
    """Every rank of a training needs at least one pack per step; with none it would have nothing to do."""
    ranks: dict[str, int] = {}
    packs: dict[str, dict[str, int]] = {}
    for name, block in config.stage_configs():
        packs_per_step = getattr(block, "packs_per_step", None)
        num_ranks = site.resources.of_stage(name).workers
        if packs_per_step is not None and num_ranks > packs_per_step:
            field = site.resources.field_of(name, "workers")
            ranks[field] = num_ranks
            packs.setdefault(field, {})[f"{'.'.join(block_path(name))}.packs_per_step"] = packs_per_step
    faults = Faults()
    for field, num_ranks in ranks.items():
        too_few = packs[field]
        shown = " and ".join(f"{name}={value}" for name, value in too_few.items())
        faults.note(
            f"{field}={num_ranks} (site {site.name}) is more than {shown}: every rank needs a pack per step; "
            f"set {field} to {min(too_few.values())} or less, or {' and '.join(too_few)} to {num_ranks} or "
            "more"
        )
    faults.raise_all()


def _check_stages_exist(config: PipelineConfig, site: Site) -> None:
    """Resources of a stage that does not exist would never take effect."""
    stages = [name for name, _ in config.stage_configs()]
    if "router" in stages:  # a site is for every pipeline, with and without joint
        stages = list(dict.fromkeys([*stages, *(spec.name for spec in JOINT_STAGES)]))
    unknown = [name for name in site.resources.stages if name not in stages]
    if unknown:
        fields = ", ".join(f"resources.stages.{name}" for name in unknown)
        raise UserError(
            f"{fields} (site {site.name}) {'is' if len(unknown) == 1 else 'are'} not a stage; known: "
            f"{', '.join(stages)}"
        )


def _check_oracle_has_ratios(config: PipelineConfig) -> None:
    configs = dict(config.stage_configs())
    stage = f"{JOINT}_ratio" if config.has_joint else "ratio"
    ratio, evaluate, block = configs.get(stage), configs.get("evaluate"), ".".join(block_path(stage))
    controls = getattr(evaluate, "controls", ())
    named = [name for name in ("oracle", "blind_oracle") if name in controls]
    if not isinstance(ratio, RatioConfig) or not isinstance(evaluate, EvaluateConfig) or not named:
        return
    field, most = ratio.budget("test")
    fewer_samples = 0 < evaluate.max_samples <= most and evaluate.seed == ratio.seed
    if "test" not in ratio.splits or (most and not fewer_samples):
        raise UserError(
            f"evaluate.controls names {' and '.join(named)}, "
            "which needs the ratios of all tiles that evaluate measures, but "
            f"{block}.splits={','.join(ratio.splits)} and {block}.{field}={most} "
            f"(drawn by {block}.seed={ratio.seed}) leave out some of the "
            f"{evaluate.max_samples or 'all'} samples of evaluate.max_samples={evaluate.max_samples} "
            f"(drawn by evaluate.seed={evaluate.seed}); "
            f"take {' and '.join(named)} out of evaluate.controls, or let it cover the test split "
            f"({block}.{field}=0)"
        )
