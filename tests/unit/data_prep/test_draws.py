"""Random draws by purpose and numbers."""

import numpy as np

from data_prep.draws import draw_bits, draw_order, draw_uniform


def test_known_draws():
    """The plans of finished runs depend on these numbers, so they must never change."""
    assert draw_bits("test", 1, np.arange(3)).tolist() == KNOWN


KNOWN = [6638703320847786337, 8668891938435739976, 7815391599302029470]


def test_the_purpose_and_each_word_change_the_draw():
    assert len({int(draw_bits(p, s, n)[0]) for p in "ab" for s in range(30) for n in range(30)}) == 1800
    assert draw_bits("a", 1, 2) != draw_bits("a", 2, 1)
    assert draw_bits("a", -1).shape == (1,)


def test_draws_of_an_array_equal_the_single_draws():
    rows = np.array([3, 10**12, 7])
    assert draw_bits("a", 5, rows).tolist() == [int(draw_bits("a", 5, int(row))[0]) for row in rows]


def test_uniform_draws_are_uniform_and_independent_of_neighbours():
    draws = draw_uniform("a", 0, np.arange(100_000))
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert draws.min() >= 0 and draws.max() < 1 and np.abs(counts - 5000).max() < 350
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.01
    assert sorted(draw_order("a", 0, np.arange(50)).tolist()) == list(range(50))
