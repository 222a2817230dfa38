"""The dtype of stages that only run a model, if the pipeline file leaves it open: the site decides, and the
value is then part of the stage's identity like any other.
"""

from typing import Any

from pydantic import BaseModel

from cluster.site import Site
from pipeline.config.graph import Graph, block_path
from pipeline.config.pipeline_file import PipelineConfig
from stages.inference import dtype_on


def with_site_dtypes(config: PipelineConfig, graph: Graph, site: Site) -> PipelineConfig:
    """Return the config in which every stage has a dtype."""
    for spec in config.stages_of(graph).stages:
        if getattr(config.stage(spec.name), "dtype", "") is None:
            config = _updated(config, block_path(spec.name), {"dtype": dtype_on(site, spec.name)})
    return config


def _updated(block: Any, path: tuple[str, ...], values: dict[str, Any]) -> Any:
    """Return a copy of nested models in which the one at `path` has other values."""
    assert isinstance(block, BaseModel)
    if not path:
        return block.model_copy(update=values)
    return block.model_copy(update={path[0]: _updated(getattr(block, path[0]), path[1:], values)})
