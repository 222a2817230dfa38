"""Compiled layers compute the same as plain layers, and a pack of another shape causes no new compilation."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from tests.numerics.consistency_case import consistency_task, samples
from tests.tiny_model import make_tiny_model
from vico.model.compiled import compile_layers
from vico.model.drop_path import add_drop_path
from vico.model.recomputed import recompute_layers
from vico.packing import packed_batch
from vico.prompt import load_prompt_format

SHAPES = [((3,), (1,)), ((2, 1), ()), ((4,), (1,), (1,)), ((1,),), ((), ())]


def keep_rotary(monkeypatch):
    """Restore the rotary embedding after the test: it is compiled for the whole process."""
    for code in (modeling_llama, modeling_qwen2, modeling_qwen3):
        monkeypatch.setattr(code, "apply_rotary_pos_emb", code.apply_rotary_pos_emb)


def packs(prompt_format):
    for number, shapes in enumerate(SHAPES):
        chosen = [samples(prompt_format, 10 * number + i, shape) for i, shape in enumerate(shapes)]
        rates = [np.arange(sample.skeleton.num_tiles) % 2 == 0 for sample in chosen]
        yield packed_batch(chosen, rates, prompt_format.settings, "sample")
    yield packed_batch([], [], prompt_format.settings, "sample")


def task_of(folder, backend):
    task = consistency_task(folder).train()
    for part in task.policy.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    add_drop_path(task.policy.base.model.vision_tower, 0.5)
    if backend is not None:
        for model in (task.policy, task._reference[0].model):
            compile_layers(model, backend)
    return task


def losses_and_gradients(task, prompt_format):
    losses, evaluated = [], []
    device = next(task.parameters()).device
    for number, pack in enumerate(packs(prompt_format)):
        pack = pack.to(device)
        torch.manual_seed(number)
        loss = task(pack)[0]
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            evaluated.append(task.eval()(pack)[0].item())
        task.train()
    return losses, evaluated, {name: p.grad for name, p in task.named_parameters()}


@pytest.mark.parametrize(
    "text", ["qwen3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen2", "llama"))]
)
def test_results_equal_those_of_plain_layers_and_new_shapes_compile_nothing_new(tmp_path, monkeypatch, text):
    keep_rotary(monkeypatch)
    folder = make_tiny_model(tmp_path / "m", text={"model_type": text})
    prompt_format = load_prompt_format(folder)
    counter = CompileCounterWithBackend("aot_eager")
    plain = losses_and_gradients(task_of(folder, None), prompt_format)
    task = task_of(folder, counter)
    compiled = losses_and_gradients(task, prompt_format)
    assert counter.frame_count
    for mine, other in zip(compiled[:2], plain[:2], strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-9)
    assert plain[0] != pytest.approx(plain[1], rel=1e-3)  # drop path was at work
    for name, gradient in plain[2].items():
        torch.testing.assert_close(compiled[2][name], gradient, rtol=1e-4, atol=1e-6, msg=name)

    num_compiled = counter.frame_count
    more = [samples(prompt_format, 99 + i, (i + 2,)) for i in range(5)]
    for last in range(1, 6):
        rates = [np.arange(sample.skeleton.num_tiles) % 3 == 0 for sample in more[:last]]
        task(packed_batch(more[:last], rates, prompt_format.settings, "sample"))[0].backward()
    assert counter.frame_count == num_compiled


class AttentionCalls(TorchDispatchMode):
    """Counts the calls of attention kernels, without those of their backward pass."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.number += "attention" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "backend",
    [pytest.param(None, id="plain"), pytest.param("aot_eager", id="compiled", marks=pytest.mark.slow)],
)
def test_recomputed_layers_give_equal_gradients_and_selective_ones_keep_attention(
    tmp_path, monkeypatch, backend
):
    keep_rotary(monkeypatch)
    folder = make_tiny_model(tmp_path / "m")
    prompt_format = load_prompt_format(folder)
    calls, results = {}, {}
    for checkpointing in ("none", "selective", "full"):
        task = task_of(folder, backend)
        recompute_layers(task.policy, checkpointing)
        results[checkpointing] = losses_and_gradients(task, prompt_format)
        with AttentionCalls() as counted:
            loss = task(next(packs(prompt_format)))[0]
            in_forward = counted.number
            loss.backward()
        calls[checkpointing] = counted.number - in_forward
    for checkpointing in ("selective", "full"):
        assert results[checkpointing][:2] == results["none"][:2]
        for name, gradient in results["none"][2].items():
            computed = results[checkpointing][2][name]
            if backend is None:
                assert torch.equal(computed, gradient), name
            else:  # a compiled backward pass of other saved tensors rounds sums in another order; biases of
                # keys have a gradient of 0 but for rounding
                assert (computed - gradient).norm() <= 1e-6 * gradient.norm() + 1e-9, name
    # two layers of each tower; the language model's attend to each of the two samples by themselves
    assert calls == {"none": 0, "selective": 0, "full": 2 + 2 * 2}
