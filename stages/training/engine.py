"""DeepSpeed behind one door: an engine over one module, its checkpoints, its whole weights, prebuilt
extensions.

The training loop in `stages/training/loop.py` knows micro-batches and steps; nothing here knows what is
trained.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import groups as process_groups
from torch import nn

from stages.training.background_writer import BackgroundWriter
from stages.training.engine_settings import EngineSettings
from stages.training.parameter_groups import ParameterGroup
from vico.objectives.phases import Phases

logger = logging.getLogger(__name__)


def sharded_inference(module: nn.Module, offload: bool) -> nn.Module:
    """The frozen module with its parameters spread over all ranks (ZeRO-3 without an optimizer), on the
    device or in host memory; call it like the module."""
    zero: dict[str, object] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": next(module.parameters()).dtype == torch.bfloat16},
        "steps_per_print": 2**31,
        "zero_optimization": zero,
    }
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine


def whole_parameter(parameter: nn.Parameter) -> AbstractContextManager:
    """The parameter whole on this rank for the time of the context, for reading."""
    return deepspeed.zero.GatheredParameters([parameter])


def init_distributed(timeout_s: float) -> None:
    """Joins the process group that the launcher has made, or makes it from the environment (gloo without
    CUDA). A rank waits `timeout_s` for the others."""
    backend, timeout = "nccl" if torch.cuda.is_available() else "gloo", timedelta(seconds=timeout_s)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, auto_mpi_discovery=False, verbose=False)
    if process_groups._WORLD_GROUP is None:
        # DeepSpeed reduces gradients in a copy of the group, which it would make with torch's own time-out:
        # on NCCL that ends the ranks that wait long before the watchdog has said for whom
        process_groups._WORLD_GROUP = torch.distributed.new_group(timeout=timeout)


def prebuild_extensions() -> None:
    """Compiles the extensions that a CPU run loads, so that no run or test waits for a compiler."""
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    for builder in (CPUAdamBuilder(), ShareMemCommBuilder()):
        builder.load(verbose=False)


class Engine:
    """One module under DeepSpeed with AdamW; counts micro-steps, saves and loads, gathers whole weights."""

    def __init__(self, module: nn.Module, groups: Sequence[ParameterGroup], settings: EngineSettings):
        self.settings = settings
        self.phases = Phases()
        self._rates = [group.rate for group in groups]
        # DeepSpeed updates states in host memory by an AdamW of its own: torch's would be slow there.
        adamw = torch.optim.AdamW if settings.offload == "none" else DeepSpeedCPUAdam
        optimizer = adamw(
            [{"params": list(group.parameters), "weight_decay": group.weight_decay} for group in groups],
            lr=1.0,
            betas=settings.betas,
        )
        if settings.zero_stage == 3:
            # torch reads out_proj.weight without calling its module: gather an attention block as one
            attention = {type(part) for part in module.modules() if isinstance(part, nn.MultiheadAttention)}
            if attention:
                deepspeed.utils.set_z3_leaf_modules(module, list(attention))
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings.as_dict())
        self._writer = BackgroundWriter(self._engine.checkpoint_engine)
        self._engine.checkpoint_engine = self._writer
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def __call__(self, batch, **options):
        return self._engine(batch, **options)

    def backward(self, loss_sum: torch.Tensor, denominator: float) -> None:
        """Gradients of `loss_sum / denominator`, both counted over all ranks and micro-steps of the step.

        DeepSpeed averages over ranks and micro-steps, so what it averages is scaled up by their number.
        """
        scale = self.world_size * self.settings.num_micro_steps / denominator
        with self.phases.phase("backward"):
            self._engine.backward(loss_sum * scale)

    def step(self, learning_rate: float, update: int) -> None:
        """Ends a micro-step; the last of update `update` (from 0) moves each group by its own rate, the
        schedule being at `learning_rate`."""
        for group, rate in zip(self._engine.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate.at(learning_rate, update)
        with self.phases.phase("optimizer"):
            self._engine.step()

    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""
        return float(self._engine.get_global_grad_norm())

    @property
    def num_skipped_steps(self) -> int:
        """Optimizer steps that DeepSpeed left out for overflow."""
        return int(self._engine.skipped_steps)

    def write_checkpoint(self, folder: Path, tag: str) -> None:
        """Begins to write every rank's files into `folder/tag`; returns when their copies are in host
        memory."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def checkpoint_written(self) -> bool:
        """Whether this rank's files are on the disk; raises OSError and the like of their writing."""
        return self._writer.written()

    def wait_for_checkpoint(self) -> None:
        """Waits until this rank's files are on the disk."""
        self._writer.wait()

    def barrier(self) -> None:
        """Waits for all ranks."""
        torch.distributed.barrier()

    def of_rank_0(self, value: Any) -> Any:
        """What rank 0 gives, on every rank: folders may look different from node to node for a while."""
        found = [value]
        torch.distributed.broadcast_object_list(found, src=0, device=self.device)
        return found[0]

    def load_checkpoint(self, folder: Path, tag: str, *, universal: bool) -> None:
        """Loads a published checkpoint, `universal` one that any number of ranks can load; RuntimeError when
        DeepSpeed finds nothing to load."""
        config = self._engine._config  # the only switch there is stands in the config of the start
        groups = self._engine.optimizer.param_groups
        own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        config.load_universal_checkpoint = universal
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        config.load_universal_checkpoint = False
        if loaded is None:
            raise RuntimeError(f"DeepSpeed could not load the checkpoint {folder}")
        # A checkpoint brings the groups of the optimizer that wrote it: DeepSpeed's own AdamW lacks a key in
        # those of torch's, and ZeRO-3's universal load gives all of them the weight decay of the first.
        for group, settings in zip(self._engine.optimizer.param_groups, own, strict=True):
            group.update(settings)
        if universal:
            self._part_step_counters()

    def _part_step_counters(self) -> None:
        """Undoes what ZeRO-3's universal load of DeepSpeed 0.19 gets wrong without a word: all parameters
        share one step counter, which each of them then counts up."""
        for state in self._engine.optimizer.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    def whole_state(self) -> dict[str, torch.Tensor] | None:
        """The module's state dict on rank 0 (CPU, whole tensors under ZeRO-3 too), None elsewhere; call on
        every rank."""
        module = self.module
        if self.settings.zero_stage < 3:
            return module.state_dict() if self.rank == 0 else None
        whole: dict[str, torch.Tensor] = {}
        copies: dict[int, torch.Tensor] = {}  # one copy of a tied parameter, so that it stays tied
        for name, parameter in module.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.rank == 0:
                    if id(parameter) not in copies:
                        copies[id(parameter)] = parameter.detach().cpu().clone()
                    whole[name] = copies[id(parameter)]
        persistent = module.state_dict().keys()
        whole.update({name: b.detach().cpu() for name, b in module.named_buffers() if name in persistent})
        return whole if self.rank == 0 else None

    def whole_gradients(self) -> dict[str, torch.Tensor]:
        """Averaged, unclipped gradients of the step in hand by name; read after the last backward, before
        `step`."""
        from deepspeed.utils import safe_get_full_grad

        named = self.module.named_parameters()
        return {name: safe_get_full_grad(parameter) for name, parameter in named if parameter.requires_grad}

    def close(self) -> None:
        """Frees DeepSpeed's hooks and buffers, so that another engine can be built in this process."""
        self._writer.cleanup()
        self._engine.destroy()
