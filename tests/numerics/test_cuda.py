"""Checks that need a CUDA device: varlen attention of packed rows, the loss and its kernel, a training under
every ZeRO stage on one rank."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.numerics.consistency_case import consistency_task, reference_run, samples
from tests.numerics.ranks import finish, start_ranks
from tests.numerics.test_chunked_kl import case, dense
from tests.numerics.test_compiled import keep_rotary, losses_and_gradients, task_of
from tests.numerics.test_zero_equalities import (
    BFLOAT16,
    MODULE,
    assert_equal,
    loss_distance,
    parameter_distance,
)
from tests.tiny_model import make_tiny_model
from vico.losses import chunked_kl
from vico.model.segments import segment_attention
from vico.model.shared_keys import SharedKeys
from vico.packing import packed_batch
from vico.prompt import load_prompt_format

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (5, 1, 130, 64)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_varlen_attention_equals_attention_by_segment(key_heads):
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    drawn = [torch.randn(1, heads, total, 64, generator=generator) for heads in (4, key_heads, key_heads)]
    on_cuda, expected = [], []
    for device, dtype, results in (("cuda", torch.bfloat16, on_cuda), ("cpu", torch.float32, expected)):
        query, key, value = (tensor.to(torch.bfloat16).to(device, dtype).requires_grad_() for tensor in drawn)
        attended, _ = segment_attention(None, query, key, value, None, segment_lengths=LENGTHS)
        attended.float().square().sum().backward()
        outputs = (attended.detach(), query.grad, key.grad, value.grad)
        results += [tensor.float().cpu() for tensor in outputs]
    for mine, other in zip(on_cuda, expected, strict=True):
        assert (mine - other).norm() <= 2e-2 * other.norm()


@pytest.mark.parametrize("key_heads", [4, 2])
def test_varlen_attention_to_shared_keys_equals_that_of_sdpa(key_heads):
    """Ends of sequences attend to kept tokens and to tokens of another segment of the row."""
    generator = torch.Generator().manual_seed(0)
    lengths, seen, kept = (5, 130, 64), [], 40
    starts = np.cumsum([kept, *lengths])
    for number, before in enumerate((np.arange(30), np.arange(0), np.r_[np.arange(7), np.arange(45, 100)])):
        seen.append(np.r_[before, np.arange(starts[number], starts[number + 1])])
    drawn = [
        torch.randn(1, heads, sum(lengths), 64, generator=generator) for heads in (4, key_heads, key_heads)
    ]
    earlier = [torch.randn(1, key_heads, kept, 64, generator=generator) for _ in range(2)]
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        query, key, value, *before = (t.to(torch.bfloat16).to(device, dtype) for t in (*drawn, *earlier))
        shared_keys = SharedKeys(
            seen=torch.from_numpy(np.concatenate(seen)).to(device),
            seen_lengths=tuple(map(len, seen)),
            kept=torch.arange(3, device=device),
            earlier={1: (before[0], before[1])},
        )
        layer = SimpleNamespace(layer_idx=1)
        attended, _ = segment_attention(
            layer, query, key, value, None, segment_lengths=lengths, shared_keys=shared_keys
        )
        results.append(attended.float().cpu())
        assert shared_keys.later[1][0].shape == (1, key_heads, 3, 64)
    assert (results[0] - results[1]).norm() <= 2e-2 * results[1].norm()


def test_float32_attention_takes_no_varlen_kernel():
    query, key, value = (torch.randn(1, 2, sum(LENGTHS), 64, device="cuda") for _ in range(3))
    attended, _ = segment_attention(None, query, key, value, None, segment_lengths=LENGTHS)
    on_cpu = [tensor.cpu() for tensor in (query, key, value)]
    expected, _ = segment_attention(None, *on_cpu, None, segment_lengths=LENGTHS)
    torch.testing.assert_close(attended.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_the_chunked_kl_equals_dense():
    ours, theirs = (
        [tensor.detach().cuda().requires_grad_() for tensor in case(torch.float64)] for _ in range(2)
    )
    loss, kl = chunked_kl(*ours[:4], ours[4].detach(), chunk_rows=4)
    expected, expected_kl = dense(*theirs[:4], theirs[4].detach())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(kl, expected_kl, rtol=1e-12, atol=1e-15)
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("num_ids", [151, 20_001])
def test_the_kernel_stays_near_float64_of_the_same_numbers(dtype, bound, num_ids):
    generator = torch.Generator().manual_seed(num_ids)
    rows, width = 70, 64  # the last chunk is not full

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to("cuda", dtype)

    hidden, weight = draw(rows, width), draw(num_ids + 7, width) * 0.4  # 7 rows of padding
    reference_hidden, reference_weight = hidden + 0.1 * draw(rows, width), weight[: num_ids + 3] * 1.01
    weights = torch.rand(rows, generator=generator).cuda()
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss, kl = chunked_kl(*ours, reference_hidden, reference_weight, weights, chunk_rows=32, num_ids=num_ids)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    heads = exact[1][:num_ids], reference_weight.double()[:num_ids]
    expected, expected_kl = dense(exact[0], heads[0], reference_hidden.double(), heads[1], weights.double())
    loss.backward()
    expected.backward()
    assert kl.dtype == torch.float32
    assert (kl - expected_kl).norm() <= 2e-4 * expected_kl.norm()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for mine, other in zip(ours, exact, strict=True):
        assert (mine.grad - other.grad).norm() <= bound * other.grad.norm()
    assert not ours[1].grad[num_ids:].any()


def test_a_loss_without_gradients_is_the_same():
    arguments = [tensor.detach().float().cuda() for tensor in case(torch.float64)]
    with torch.no_grad():
        loss, kl = chunked_kl(*arguments, chunk_rows=4)
    expected, expected_kl = dense(*(tensor.double() for tensor in arguments))
    torch.testing.assert_close(kl.double(), expected_kl, rtol=1e-4, atol=1e-7)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_row_that_is_not_finite_gives_a_loss_that_is_not_finite():
    hidden, weight, reference_hidden, reference_weight, weights = (
        tensor.detach().float().cuda() for tensor in case(torch.float64)
    )
    hidden[3, 0] = float("inf")
    _, kl = chunked_kl(hidden, weight, reference_hidden, reference_weight, weights, chunk_rows=4)
    assert torch.isfinite(kl).tolist() == [row != 3 for row in range(len(kl))]


ENGINE_CASES = [f"mixed:{stage}:{dtype}" for dtype in ("float32", "bfloat16") for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return what torch alone and one rank under DeepSpeed and NCCL computed on the device."""
    folder = tmp_path_factory.mktemp("engine")
    model, out = make_tiny_model(folder / "model"), folder / "out"
    ranks = start_ranks(MODULE, [str(model), str(out), *ENGINE_CASES], out, 1, accelerator="cuda")
    for dtype in ("float32", "bfloat16"):
        alone = reference_run(model, "mixed", getattr(torch, dtype), "cuda")
        torch.save(alone, out / f"{dtype}.pt")
    finish(ranks, out)
    names = [*ENGINE_CASES, "float32", "bfloat16"]
    return {name: torch.load(out / f"{name}.pt", "cpu", weights_only=True) for name in names}


@pytest.mark.parametrize("case", ENGINE_CASES[:3])
def test_every_zero_stage_trains_as_torch_alone_does(trained, case):
    assert_equal(trained[case], trained["float32"])


@pytest.mark.parametrize("case", ENGINE_CASES[3:])
def test_bfloat16_stays_near_torch_alone_in_bfloat16(trained, case):
    for distance in (parameter_distance, loss_distance):
        allowed = BFLOAT16 * distance(trained["bfloat16"], trained["float32"])
        assert distance(trained[case], trained["bfloat16"]) <= allowed


def test_a_pack_in_bfloat16_is_near_the_one_in_float32(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    prompt_format = load_prompt_format(folder)
    chosen = [samples(prompt_format, number, shape) for number, shape in enumerate([(3,), (2, 1), ()])]
    rates = [np.arange(sample.skeleton.num_tiles) % 2 == 0 for sample in chosen]
    pack = packed_batch(chosen, rates, prompt_format.settings, "sample").to("cuda")
    expected = consistency_task(folder).cuda()(pack)[0].item()
    task = consistency_task(folder, torch.bfloat16).cuda()
    loss, counts = task(pack)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=5e-2)
    assert counts["answer_tokens"] == len(pack.weights_A)
    assert all(torch.isfinite(parameter.grad).all() for parameter in task.parameters())


def test_compiled_layers_compute_what_plain_ones_do(tmp_path, monkeypatch):
    keep_rotary(monkeypatch)
    folder = make_tiny_model(tmp_path / "m")
    prompt_format = load_prompt_format(folder)
    plain, compiled = (
        losses_and_gradients(task_of(folder, backend).cuda(), prompt_format) for backend in (None, "inductor")
    )
    for mine, other in zip(compiled[:2], plain[:2], strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)  # text-only packs have losses near 0
    for name, gradient in plain[2].items():
        assert (compiled[2][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
