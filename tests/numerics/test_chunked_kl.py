"""Chunked KL over both heads equals the dense formula in loss and gradients, for every chunking and dtype."""

import pytest
import torch
import torch.nn.functional as F

from vico.losses import KLHead, chunked_kl

A, V, D = 23, 101, 16  # answer tokens, vocabulary, width


def case(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = draw(A, D).requires_grad_(), (draw(V, D) * 0.5).requires_grad_()
    return (
        hidden,
        weight,
        draw(A, D),
        draw(V, D) * 0.5,
        torch.rand(A, generator=generator, dtype=torch.float64).to(dtype),
    )


def dense(hidden, weight, reference_hidden, reference_weight, weights):
    log_policy = (hidden @ weight.T).log_softmax(-1)
    log_reference = (reference_hidden @ reference_weight.T).log_softmax(-1)
    kl = F.kl_div(log_policy, log_reference, log_target=True, reduction="none").sum(-1)
    return (kl * weights).sum(), kl


@pytest.mark.parametrize("chunk_rows", [1, 4, 23, 1000])
def test_equal_to_dense_in_float64(chunk_rows):
    ours, theirs = case(torch.float64), case(torch.float64)
    loss, kl = chunked_kl(*ours, chunk_rows=chunk_rows)
    expected, expected_kl = dense(*theirs)
    (loss * 3).backward()
    (expected * 3).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(kl, expected_kl, rtol=1e-12, atol=1e-15)
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-14)


def test_bfloat16_stays_near_float64_of_the_same_numbers():
    ours = case(torch.bfloat16)
    exact = [t.detach().double() for t in case(torch.bfloat16)[:4]]
    exact[0].requires_grad_(), exact[1].requires_grad_()
    loss, _ = chunked_kl(*ours, chunk_rows=4)
    expected, _ = dense(*exact, ours[4].double())
    loss.backward()
    expected.backward()
    assert abs(loss.item() - expected.item()) < 2e-2 * expected.item()
    for mine, other in zip(ours[:2], exact[:2], strict=True):
        assert (mine.grad.double() - other.grad).norm() < 2e-2 * other.grad.norm()


def test_zero_where_policy_is_reference():
    hidden, weight, *_, weights = case(torch.float32)
    loss, kl = chunked_kl(hidden, weight, hidden.detach(), weight.detach(), weights, chunk_rows=5)
    loss.backward()
    assert loss.item() == 0 and kl.abs().max() == 0
    assert hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_no_answer_tokens_give_zero_loss_and_zero_gradients():
    _, weight, _, reference_weight, _ = case(torch.float32)
    empty = torch.zeros(0, D, requires_grad=True)
    loss, kl = chunked_kl(empty, weight, empty.detach(), reference_weight, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0 and kl.shape == (0,) and weight.grad.abs().max() == 0


def test_tied_weight_gets_both_gradients():
    head = KLHead(D, V, bias=False)
    ids = torch.arange(A) % V
    _, _, reference_hidden, reference_weight, weights = case(torch.float32)
    loss, _ = head(F.embedding(ids, head.weight), reference_hidden, reference_weight, weights, 7)
    loss.backward()
    mine = head.weight.grad.clone()
    head.weight.grad = None
    dense(F.embedding(ids, head.weight), head.weight, reference_hidden, reference_weight, weights)[
        0
    ].backward()
    torch.testing.assert_close(mine, head.weight.grad, rtol=1e-4, atol=1e-5)


def test_different_vocabularies_are_refused():
    hidden, weight, reference_hidden, reference_weight, weights = case(torch.float32)
    with pytest.raises(ValueError, match="policy vocabulary 101 and reference vocabulary 99 differ"):
        chunked_kl(hidden, weight, reference_hidden, reference_weight[:99], weights)
