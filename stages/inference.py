"""What an actor needs that only runs models: where they lie, what the site allows, and both models opened.

Used by the actors of ratio and evaluate. Importing this is light; torch comes when models are opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stages.context import Context
from stages.outputs import POLICY_FOLDER

if TYPE_CHECKING:
    import torch

    from data_prep.shards.reader import SampleReader
    from vico.model.internvl import VicoModel


Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class InferenceSettings:
    """Picklable: folders of policy, reference and shards, dtype and device, and the site's limits."""

    policy_folder: Path
    reference_folder: Path
    shard_folder: Path
    dtype: Dtype
    device: str
    num_threads: int
    row_tokens: int
    generation_tokens: int
    batch_tiles: int
    kl_chunk_rows: int


def inference_settings(context: Context, dtype: Dtype) -> InferenceSettings:
    """The settings of a stage with the inputs shard, model and consistency."""
    resources, inference = context.site.resources, context.site.inference
    return InferenceSettings(
        policy_folder=context.inputs["consistency"] / POLICY_FOLDER,
        reference_folder=context.inputs["model"],
        shard_folder=context.inputs["shard"],
        dtype=dtype,
        device="cuda" if resources.gpus_per_worker else "cpu",
        num_threads=resources.threads_per_worker,
        row_tokens=inference.row_tokens,
        generation_tokens=inference.generation_tokens,
        batch_tiles=inference.batch_tiles,
        kl_chunk_rows=context.site.train.kl_chunk_rows,
    )


def opened_reader(settings: InferenceSettings) -> SampleReader:
    """The shards, read with the tokenizer of the reference; also sets the number of threads of this
    process.
    """
    import torch

    from data_prep.shards.reader import SampleReader
    from vico.prompt import load_prompt_format

    torch.set_num_threads(settings.num_threads)
    return SampleReader(settings.shard_folder, load_prompt_format(settings.reference_folder))


def opened_policy(settings: InferenceSettings, router_file: Path | None = None) -> VicoModel:
    """The policy, with the router of `router_file` where one is given."""
    model = _opened(settings.policy_folder, settings)
    return model if router_file is None else with_router(model, router_file)


def opened_models(settings: InferenceSettings, reader: SampleReader) -> tuple[VicoModel, VicoModel]:
    """The policy and the frozen start model; UserError where the policy, which may have been trained
    elsewhere, does not start from it."""
    from vico.objectives.consistency import check_same_start
    from vico.prompt import check_same_tokens, load_prompt_format

    check_same_tokens(load_prompt_format(settings.policy_folder), reader.prompt_format)
    policy, reference = opened_policy(settings), _opened(settings.reference_folder, settings)
    check_same_start(policy, reference, len(reader.prompt_format.tokenizer))
    return policy, reference


def _opened(folder: Path, settings: InferenceSettings) -> VicoModel:
    import torch

    from vico.checkpoints import load_model

    return load_model(folder, getattr(torch, settings.dtype), settings.device)


def with_router(model: VicoModel, router_file: Path) -> VicoModel:
    """The model with the trained router of a file (keys `router.*`) added to it."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = load_file(router_file)
    model.add_router(0)
    model.router.load_state_dict({key.removeprefix("router."): tensor for key, tensor in tensors.items()})
    return model
