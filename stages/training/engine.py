"""DeepSpeed behind one door: an engine over one module, its checkpoints, its whole weights, prebuilt
extensions.

The training loop in `stages/training/loop.py` knows micro-batches and steps; nothing here knows what is
trained.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from stages.training.background_writer import BackgroundWriter
from stages.training.engine_settings import EngineSettings
from stages.training.lean_deepspeed import deepspeed
from stages.training.parameter_groups import ParameterGroup
from stages.training.partitioned import spread_unread
from stages.training.safe_loading import weights_only
from stages.training.state_digests import FileDigest
from vico.model.compiled import compiled_layer_types
from vico.objectives.phases import Phases

logger = logging.getLogger(__name__)
Value = TypeVar("Value")


def sharded_inference(module: nn.Module, offload: bool) -> nn.Module:
    """Return the frozen module with its parameters spread over all ranks (ZeRO-3 without an optimizer), on
    the device or in host memory; call it like the module. Its parameters may be unread."""
    zero: dict[str, object] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": next(module.parameters()).dtype == torch.bfloat16},
        "steps_per_print": 2**31,
        "zero_optimization": zero,
    }
    _gather_as_wholes(module)
    spread_unread(module, config)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine


def _gather_as_wholes(module: nn.Module) -> None:
    """Make ZeRO-3 gather the parameters of a compiled layer together, before it takes the module: the hooks
    of the layer's parts would be compiled into it."""
    wholes = compiled_layer_types(module)
    if wholes:
        deepspeed.utils.set_z3_leaf_modules(module, list(wholes))


def whole_parameter(parameter: nn.Parameter) -> AbstractContextManager[None]:
    """Return a context in which the parameter is whole on this rank, for reading."""
    return deepspeed.zero.GatheredParameters([parameter])


def init_distributed(timeout_s: float) -> None:
    """Join the process group that the launcher has made, or make it from the environment (gloo without CUDA).

    A rank waits `timeout_s` for the others.
    """
    backend, timeout = "nccl" if torch.cuda.is_available() else "gloo", timedelta(seconds=timeout_s)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, auto_mpi_discovery=False, verbose=False)
    process_groups = deepspeed.utils.groups
    if process_groups._WORLD_GROUP is None:
        # DeepSpeed reduces gradients in a copy of the group, which it would make with torch's default
        # timeout: on NCCL that ends the waiting ranks before the watchdog has said which rank hangs.
        process_groups._WORLD_GROUP = torch.distributed.new_group(timeout=timeout)


def prebuild_extensions() -> None:
    """Compile the extensions that a CPU run loads, so that no run or test waits for a compiler."""
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    for builder in (CPUAdamBuilder(), ShareMemCommBuilder()):
        builder.load(verbose=False)


class Engine:
    """One module under DeepSpeed with AdamW; counts micro-steps, saves and loads, gathers whole weights.

    Under ZeRO-3 the module's parameters may be unread.
    """

    def __init__(self, module: nn.Module, groups: Sequence[ParameterGroup], settings: EngineSettings):
        self.settings = settings
        self.phases = Phases()
        self._rates = [group.rate for group in groups]
        # DeepSpeed has an AdamW of its own for states in host memory, where torch's would be slow.
        adamw: Callable[..., torch.optim.Optimizer] = deepspeed.ops.adam.DeepSpeedCPUAdam
        if settings.offload == "none":
            adamw = partial(torch.optim.AdamW, fused=True if settings.fused else None)
        optimizer = adamw(
            [{"params": list(group.parameters), "weight_decay": group.weight_decay} for group in groups],
            lr=1.0,
            betas=settings.betas,
        )
        if settings.zero_stage == 3:
            _gather_as_wholes(module)
            spread_unread(module, settings.as_dict())
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

    def __call__(self, batch: object, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the module's loss sum and counts for a batch."""
        return self._engine(batch, **options)

    def backward(self, loss_sum: torch.Tensor, denominator: float) -> None:
        """Compute the gradients of `loss_sum / denominator`, both counted over all ranks and micro-steps.

        DeepSpeed averages over ranks and micro-steps, so the loss is scaled up by their number first.
        """
        scale = self.world_size * self.settings.num_micro_steps / denominator
        with self.phases.phase("backward"):
            self._engine.backward(loss_sum * scale)

    def step(self, learning_rate: float, update: int) -> None:
        """End a micro-step. The last micro-step of update `update` (from 0) moves each group by its own rate,
        with the schedule at `learning_rate`."""
        for group, rate in zip(self._engine.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate.at(learning_rate, update)
        with self.phases.phase("optimizer"):
            self._engine.step()

    def grad_norm(self) -> float:
        """Return the norm of the last step's gradient before clipping."""
        return float(self._engine.get_global_grad_norm())

    @property
    def num_skipped_steps(self) -> int:
        """Return how many optimizer steps DeepSpeed has skipped for overflow."""
        return int(self._engine.skipped_steps)

    def write_checkpoint(self, folder: Path, tag: str) -> None:
        """Start to write every rank's files into `folder/tag`; return when their copies are in host
        memory."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def checkpoint_written(self) -> bool:
        """Return whether this rank's files are on the disk; raise what their writing raised, such as
        OSError."""
        return self._writer.written()

    def wait_for_checkpoint(self) -> None:
        """Wait until this rank's files are on the disk."""
        self._writer.wait()

    def checkpoint_digests(self, folder: Path, tag: str) -> dict[str, FileDigest]:
        """Return name -> digest of the files that all ranks have written into `folder/tag`; all must call
        it."""
        own = {
            Path(path).relative_to(folder / tag).as_posix(): digest
            for path, digest in self._writer.pop_digests().items()
        }
        return {name: digest for digests in self.of_all_ranks(own) for name, digest in digests.items()}

    def of_all_ranks(self, value: Value) -> list[Value]:
        """Return every rank's value, by rank; all must call it."""
        values = [value] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        torch.distributed.barrier()

    def of_rank_0(self, value: Value) -> Value:
        """Return rank 0's value on every rank: nodes may see different content of a folder for a while."""
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def load_checkpoint(self, folder: Path, tag: str, *, universal: bool) -> None:
        """Load a published checkpoint, or a `universal` one that any number of ranks can load.

        Raises RuntimeError if DeepSpeed finds nothing to load, UnsafeState if a file holds more than tensors
        and plain values.
        """
        config = self._engine._config  # the only switch for it is in the config of the start
        groups = self._engine.optimizer.param_groups
        own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        config.load_universal_checkpoint = universal
        with weights_only():
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        config.load_universal_checkpoint = False
        if loaded is None:
            raise RuntimeError(f"DeepSpeed could not load the checkpoint {folder}")
        # A checkpoint restores the parameter groups of the optimizer that wrote it. Those of DeepSpeed's
        # AdamW lack a key of torch's, and ZeRO-3's universal load gives all groups the weight decay of the
        # first.
        for group, settings in zip(self._engine.optimizer.param_groups, own, strict=True):
            group.update(settings)
        self._own_step_counters()

    def _own_step_counters(self) -> None:
        """Give every parameter a step counter of its own that the optimizer counts up.

        DeepSpeed 0.19 loads a universal checkpoint with one counter for all parameters under ZeRO-3, which
        each of them would count up. Its AdamW writes numbers, on which torch's would not count. The fused
        one needs the counters on the device.
        """
        for parameter, state in self._engine.optimizer.optimizer.state.items():
            step = state.get("step")
            if isinstance(step, torch.Tensor):
                state["step"] = step.to(parameter.device if self.settings.fused else step.device, copy=True)
            elif step is not None and self.settings.offload == "none":
                device = parameter.device if self.settings.fused else "cpu"
                state["step"] = torch.tensor(float(step), device=device)

    def whole_state(self) -> dict[str, torch.Tensor] | None:
        """Return the module's state dict on rank 0 (on the CPU with whole tensors under ZeRO-3), None
        elsewhere.

        Every rank must call it.
        """
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
        """Return the averaged, unclipped gradients of the current step by name.

        Call it after the last backward, before `step`.
        """
        from deepspeed.utils import safe_get_full_grad

        named = self.module.named_parameters()
        return {name: safe_get_full_grad(parameter) for name, parameter in named if parameter.requires_grad}

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers, so that another engine can be built in this process."""
        self._writer.cleanup()
        self._engine.destroy()
