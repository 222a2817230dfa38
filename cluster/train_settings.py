"""The `train` block of a site file: how a training uses the machine. Nothing here changes a result."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.settings.blocks import SiteBlock


class MemorySettings(SiteBlock):
    """What is kept in the memory of each device during training, and what is spread, moved or recomputed."""

    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed ZeRO stage. 1 spreads optimizer states over the ranks, 2 also gradients, 3 also parameters.
    """
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What is kept in host memory: nothing, the optimizer states, or these and the parameters (only with
    `zero_stage: 3`)."""
    reference: Literal["replicated", "sharded", "cpu"] = "replicated"
    """Where the frozen reference model is kept: a copy on every rank, spread over the ranks, or spread and in
    host memory."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Which activations of a layer are recomputed in the backward pass instead of kept: `full` keeps only the
    layer's input, `selective` also what its attention returns, the most expensive part to recompute. `none`
    keeps all."""
    kl_chunk_rows: int | None = Field(None, ge=1)
    """Number of answer tokens whose logits are in memory at the same time when the loss is computed. null:
    1024 on GPUs, 256 on CPUs."""
    frozen_outputs_gb: float = Field(20, ge=0)
    """Most gigabytes that a training keeps in the storage, while it works, of what its frozen parts compute:
    the vision features of its tiles (router; consistency with a frozen vision tower) and the reference's
    hidden states at answers (consistency). A consistency training keeps them only if it reads its samples
    1.25 times or more. What would exceed the limit, the features first, is computed in every step instead,
    with 0 everything. Results differ by rounding."""

    def chunk_rows(self, *, on_gpus: bool) -> int:
        """Return `kl_chunk_rows`, or its default on this kind of device."""
        return self.kl_chunk_rows or (1024 if on_gpus else 256)


class AttentionSettings(SiteBlock):
    """Which kernels compute attention on CUDA in bfloat16. Results differ by rounding."""

    rows: Literal["auto", "flash-attn-4", "flash-attn-3", "flash-attn-2", "torch"] = "auto"
    """Kernel for packed rows of the language model. `auto`: the first of this list that is installed and
    supports the device and the model; another value forces that kernel, or the stage is refused."""
    vision: Literal["auto", "cudnn", "flash", "efficient"] = "auto"
    """Backend of torch's attention in the vision tower, whose tiles all have the same length. `auto`: the
    first of cudnn, flash and efficient that supports the device; another value forces that backend."""


class CheckpointSettings(SiteBlock):
    """How often a training saves its state, and how many of these checkpoints are kept."""

    every_steps: int = Field(20, ge=1)
    """Number of steps from one checkpoint to the next."""
    every_s: float | None = Field(None, gt=0)
    """Seconds after the last checkpoint at which the next one is due, even if fewer steps than `every_steps`
    have passed; null: only steps count. With steps of unknown length, set this and a large `every_steps`."""
    keep: int = Field(2, ge=1)
    """Number of checkpoints to keep. All are removed when the stage is done."""


class RestartSettings(SiteBlock):
    """When the ranks of a training start again from the last checkpoint, and how long they wait."""

    max_failures: int = Field(2, ge=0)
    """Number of restarts after a rank died or hung. One more failure fails the stage."""
    max_preemptions: int = Field(100, ge=0)
    """Number of restarts after a rank got SIGTERM or its node was taken away."""
    start_timeout_s: float = Field(3600, gt=0)
    """Seconds that a start waits for free resources in the cluster, also after a node was lost."""
    hang_timeout_s: float = Field(1800, gt=0)
    """Seconds without a finished step after which a rank writes its stack traces to a file and ends."""

    @property
    def collective_timeout_s(self) -> float:
        """Return the time that a rank waits for the others in a collective: longer than `hang_timeout_s`, so
        that the watchdog reports first which rank hung where."""
        return self.hang_timeout_s + 60


class DivergenceSettings(SiteBlock):
    """What counts as a training that goes wrong in its numbers, and when it stops the stage."""

    loss_spike_factor: float = Field(10, gt=1)
    """A loss above this factor times the median of the last 50 losses counts as a spike."""
    max_loss_spikes: int | None = Field(None, ge=0)
    """Number of loss spikes after which one more stops the training; null: spikes are only counted."""
    max_skipped_steps: int | None = Field(None, ge=0)
    """Number of updates that may be skipped because their gradient is not finite; null: the first one stops
    the training."""


class ProfilingSettings(SiteBlock):
    """What is measured about the speed of a training."""

    profile: bool = False
    """Report the seconds of each part of a step. On CUDA this waits for the device at every part, which makes
    steps slower."""
    trace_steps: tuple[int, int] | None = None
    """First and last update, counted from 1, that torch's profiler records into the attempt's folder; null:
    no trace."""
    throughput_steps: int = Field(0, ge=0)
    """Number of updates that are measured before a training begins, to predict its duration. Their results
    are discarded. 0: none."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak TFLOP/s of one device in the training's dtype, without sparsity. With it, metrics contain `mfu`,
    the share of this peak that is used; null: no `mfu`."""

    @model_validator(mode="after")
    def trace_has_steps(self) -> ProfilingSettings:
        if self.trace_steps is not None and not 1 <= self.trace_steps[0] <= self.trace_steps[1]:
            raise ValueError(
                f"train.profiling.trace_steps={list(self.trace_steps)} is not a range of updates; give the "
                "first and the last one, counted from 1, such as [5, 6]"
            )
        return self


class TrainSettings(SiteBlock):
    """How a training uses the machine."""

    memory: MemorySettings = MemorySettings()
    attention: AttentionSettings = AttentionSettings()
    """Kernels of attention, also in stages that only run the model."""
    checkpoints: CheckpointSettings = CheckpointSettings()
    restarts: RestartSettings = RestartSettings()
    divergence: DivergenceSettings = DivergenceSettings()
    profiling: ProfilingSettings = ProfilingSettings()
    compile: bool = False
    """Compile the layers with torch: faster on CUDA, but the first start takes some minutes longer. With
    `zero_stage: 3` or a sharded reference, the parameters of a layer are then gathered together."""
    data_threads: int = Field(2, ge=1)
    """Threads per rank that decode the images of the next step while the current one trains."""
    deepspeed: dict[str, Any] = Field({})
    """More of DeepSpeed's own settings, merged into ours. Keys that could change the result are refused."""
