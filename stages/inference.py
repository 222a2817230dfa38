"""Open what an inference actor needs: the shards, the policy and the reference, by the site's limits.

The actors of ratio and evaluate use it. Importing it is light; torch is imported when models are opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stages.context import Context
from stages.outputs import POLICY_FOLDER
from vico.errors import UserError

if TYPE_CHECKING:
    from data_prep.shards.reader import SampleReader
    from vico.model.internvl import VicoModel
    from vico.model.router import Router


Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class InferenceSettings:
    """Folders of policy, reference and shards, dtype and device, and the site's limits. Can be pickled."""

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
    """Return the settings of a stage with the inputs shard, model and consistency."""
    resources, inference = context.site.resources, context.site.inference
    return InferenceSettings(
        policy_folder=context.folder("consistency") / POLICY_FOLDER,
        reference_folder=context.folder("model"),
        shard_folder=context.folder("shard"),
        dtype=dtype,
        device="cuda" if resources.gpus_per_worker else "cpu",
        num_threads=resources.threads_per_worker,
        row_tokens=inference.row_tokens,
        generation_tokens=inference.generation_tokens,
        batch_tiles=inference.batch_tiles,
        kl_chunk_rows=context.site.train.memory.kl_chunk_rows,
    )


def open_reader(settings: InferenceSettings) -> SampleReader:
    """Open the shards with the reference's tokenizer; also set torch's number of threads."""
    import torch

    from data_prep.shards.reader import SampleReader
    from vico.prompt import load_prompt_format

    torch.set_num_threads(settings.num_threads)
    return SampleReader(settings.shard_folder, load_prompt_format(settings.reference_folder))


def load_policy(settings: InferenceSettings) -> VicoModel:
    """Load the policy, without a router."""
    return _load(settings.policy_folder, settings)


def load_models(settings: InferenceSettings, reader: SampleReader) -> tuple[VicoModel, VicoModel]:
    """Load the policy and the frozen reference. If their vision towers are equal, both have the same one.

    Raises UserError if the policy, which may have been trained elsewhere, does not start from the reference.
    """
    from vico.inference.tile_losses import share_tower
    from vico.objectives.consistency import check_same_start
    from vico.prompt import check_same_tokens, load_prompt_format

    check_same_tokens(load_prompt_format(settings.policy_folder), reader.prompt_format)
    policy, reference = load_policy(settings), _load(settings.reference_folder, settings)
    check_same_start(policy, reference, len(reader.prompt_format.tokenizer))
    share_tower(policy, reference)
    return policy, reference


def _load(folder: Path, settings: InferenceSettings) -> VicoModel:
    import torch

    from vico.checkpoints import load_model

    return load_model(folder, getattr(torch, settings.dtype), settings.device)


def load_router(model: VicoModel, router_file: Path) -> Router:
    """Add the trained router of a file (keys `router.*`) to the model and return it.

    Raises UserError for a router that is made for vision tokens of another width.
    """
    from safetensors.torch import load_file

    tensors = {key.removeprefix("router."): tensor for key, tensor in load_file(router_file).items()}
    width = tensors["pooling_before_gating.query_token"].shape[1]
    if width != model.vision_width:
        raise UserError(
            f"{router_file}: the router reads vision tokens of width {width}, but the policy's vision tower "
            f"gives {model.vision_width}; take the router that was trained on this policy"
        )
    model.add_router(0)
    assert model.router is not None
    model.router.load_state_dict(tensors)
    return model.router
