"""What only a CUDA device can show: varlen attention of packed rows, the loss, a pack in bfloat16."""

import numpy as np
import pytest
import torch

from tests.numerics.consistency_case import consistency_task, samples
from tests.numerics.test_chunked_kl import case, dense
from tests.tiny_model import make_tiny_model
from vico.losses import chunked_kl
from vico.packing import packed_batch
from vico.prompt import load_prompt_format
from vico.segments import segment_attention

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
    found, expected = [], []
    for device, dtype, results in (("cuda", torch.bfloat16, found), ("cpu", torch.float32, expected)):
        query, key, value = (one.to(torch.bfloat16).to(device, dtype).requires_grad_() for one in drawn)
        attended, _ = segment_attention(None, query, key, value, None, segment_lengths=LENGTHS)
        attended.float().square().sum().backward()
        results += [one.float().cpu() for one in (attended.detach(), query.grad, key.grad, value.grad)]
    for mine, other in zip(found, expected, strict=True):
        assert (mine - other).norm() <= 2e-2 * other.norm()


def test_float32_attention_takes_no_varlen_kernel():
    query, key, value = (torch.randn(1, 2, sum(LENGTHS), 64, device="cuda") for _ in range(3))
    attended, _ = segment_attention(None, query, key, value, None, segment_lengths=LENGTHS)
    on_cpu = [one.cpu() for one in (query, key, value)]
    expected, _ = segment_attention(None, *on_cpu, None, segment_lengths=LENGTHS)
    torch.testing.assert_close(attended.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_the_chunked_kl_equals_dense():
    ours, theirs = ([one.detach().cuda().requires_grad_() for one in case(torch.float64)] for _ in range(2))
    loss, kl = chunked_kl(*ours[:4], ours[4].detach(), chunk_rows=4)
    expected, expected_kl = dense(*theirs[:4], theirs[4].detach())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(kl, expected_kl, rtol=1e-12, atol=1e-15)
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-14)


def test_a_pack_in_bfloat16_is_near_the_one_in_float32(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    prompt_format = load_prompt_format(folder)
    found = [samples(prompt_format, number, shape) for number, shape in enumerate([(3,), (2, 1), ()])]
    rates = [np.arange(sample.skeleton.num_tiles) % 2 == 0 for sample in found]
    pack = packed_batch(found, rates, prompt_format.settings, "sample").to("cuda")
    expected = consistency_task(folder).cuda()(pack)[0].item()
    task = consistency_task(folder, torch.bfloat16).cuda()
    loss, counts = task(pack)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=5e-2)
    assert counts["answer_tokens"] == len(pack.weights_A)
    assert all(torch.isfinite(parameter.grad).all() for parameter in task.parameters())
