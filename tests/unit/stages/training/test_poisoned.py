"""A loss that is not finite has a gradient with which no engine makes an update."""

import pytest
import torch

from stages.training.step import poisoned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_finite_loss_keeps_its_gradient_bit_for_bit(dtype):
    weight = torch.randn(7, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    loss = (weight * 3).sum()
    [expected] = torch.autograd.grad(loss, weight, retain_graph=True)
    [gradient] = torch.autograd.grad(poisoned(loss), weight)
    assert poisoned(loss).item() == loss.item() and gradient.dtype == dtype
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(bad):
    weight = torch.ones(7, requires_grad=True)
    loss = weight.sum() + bad  # its own gradient is finite
    assert torch.autograd.grad(loss, weight, retain_graph=True)[0].isfinite().all()
    assert torch.autograd.grad(poisoned(loss), weight)[0].isnan().all()
