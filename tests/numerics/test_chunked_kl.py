"""The chunked KL over both heads equals the dense formula in loss and gradients, for every chunking and
dtype."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from vico.losses import KLHead, chunked_cross_entropy, chunked_kl

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


@pytest.mark.parametrize("chunk_rows", [1, 4, 23, 1000])
def test_cross_entropy_is_equal_to_dense_in_float64(chunk_rows):
    (hidden, weight, *_, weights), (exact_hidden, exact_weight, *_) = case(torch.float64), case(torch.float64)
    num_ids = 90  # the last rows of the head are padding
    ids = torch.randint(0, num_ids, (A,), generator=torch.Generator().manual_seed(3))
    loss, loss_A = chunked_cross_entropy(hidden, weight, ids, weights, chunk_rows, num_ids)
    logits = exact_hidden @ exact_weight[:num_ids].T
    expected_A = F.cross_entropy(logits, ids, reduction="none")
    expected = (expected_A * weights).sum()
    (loss * 3).backward()
    (expected * 3).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss_A, expected_A.detach(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(hidden.grad, exact_hidden.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weight.grad, exact_weight.grad, rtol=1e-12, atol=1e-14)
    assert (weight.grad[num_ids:] == 0).all()


def test_cross_entropy_is_the_kl_to_a_reference_that_is_certain():
    hidden, weight, *_, weights = case(torch.float64)
    ids = torch.randint(0, V, (A,), generator=torch.Generator().manual_seed(3))
    certain = 1e3 * F.one_hot(ids, V).double()
    kl, _ = chunked_kl(hidden, weight, certain, torch.eye(V, dtype=torch.float64), weights)
    loss, _ = chunked_cross_entropy(hidden, weight, ids, weights)
    torch.testing.assert_close(loss, kl, rtol=1e-12, atol=0)


def test_cross_entropy_in_bfloat16_stays_near_float64_of_the_same_numbers():
    hidden, weight, *_, weights = case(torch.bfloat16)
    ids = torch.randint(0, V, (A,), generator=torch.Generator().manual_seed(3))
    loss, _ = chunked_cross_entropy(hidden, weight, ids, weights, chunk_rows=4)
    exact = F.cross_entropy(hidden.detach().double() @ weight.detach().double().T, ids, reduction="none")
    assert abs(loss.item() - (exact * weights.double()).sum()) < 2e-2 * loss.item()


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


@pytest.mark.parametrize("rows", [(101, 96), (96, 101), (101, 101)], ids=str)
def test_padding_ids_enter_neither_softmax_and_get_no_gradient(rows):
    """Ids are 0 to 95; the rows after them are huge in either head, so that a leak would show."""
    hidden, weight, reference_hidden, reference_weight, weights = (t.detach() for t in case(torch.float64))
    weight[96:] = 50.0
    reference_weight[96:] = -50.0
    hidden.requires_grad_(), weight.requires_grad_()
    mine = hidden.detach().clone().requires_grad_(), weight.detach()[: rows[0]].clone().requires_grad_()
    loss, kl = chunked_kl(
        *mine, reference_hidden, reference_weight[: rows[1]], weights, chunk_rows=7, num_ids=96
    )
    expected, expected_kl = dense(hidden, weight[:96], reference_hidden, reference_weight[:96], weights)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(kl, expected_kl, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(mine[0].grad, hidden.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mine[1].grad[:96], weight.grad[:96], rtol=1e-12, atol=1e-14)
    assert torch.all(mine[1].grad[96:] == 0)


def test_more_ids_than_the_smaller_head_has_rows_are_refused():
    hidden, weight, reference_hidden, reference_weight, weights = case(torch.float32)
    with pytest.raises(ValueError, match="num_ids=100 is more than the 99 rows"):
        chunked_kl(hidden, weight, reference_hidden, reference_weight[:99], weights, num_ids=100)


def test_a_second_backward_over_one_forward_is_refused():
    loss, _ = chunked_kl(*case(torch.float32))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out already"):
        loss.backward()


def test_memory_does_not_grow_with_answer_tokens():
    """The peak above inputs and gradients is the same for sixteen chunks of tokens as for one.

    Each is measured in a process of its own, because memory that the allocator kept from the first would
    distort the second.
    """
    code = """
import sys, torch
from benchmarks import kl
kl.VOCABULARY, kl.WIDTH = 20_000, 32
print(kl.measured("ours", int(sys.argv[1]), torch.float32, "cpu")["memory_gb"])
"""

    def peak_gb(tokens: int) -> float:
        command = [sys.executable, "-c", code, str(tokens)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    chunk_gb = 256 * 20_000 * 4 / 1e9
    one_chunk, sixteen_chunks = peak_gb(256), peak_gb(4096)
    # The allocator rounds up by at most a chunk; logits that are kept would add fifteen.
    assert sixteen_chunks < one_chunk + 2 * chunk_gb, (one_chunk, sixteen_chunks, chunk_gb)
