"""Labels from losses: floor, percentile over the window, ties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vico.objectives.labels import COMPRESS, loss_ratio, share_near_tau, tile_labels, window_percentiles


@given(
    st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.25, 7.0, 11.3]) | st.floats(0, 50), min_size=1, max_size=80),
    st.floats(0.1, 99.9),
    st.integers(1, 100),
)
def test_the_window_percentile_equals_numpys(ratios, percentile, window):
    expected = [np.percentile(ratios[max(0, n + 1 - window) : n + 1], percentile) for n in range(len(ratios))]
    assert window_percentiles(np.array(ratios), percentile, window).tolist() == expected


def test_equal_ratios_are_all_compressed():
    ratios = np.full(50, 1.7)
    for percentile in (1.0, 33.3, 50.0, 67.0, 99.0):
        assert (tile_labels(ratios, window_percentiles(ratios, percentile, 10)) == COMPRESS).all()


def test_the_percentile_is_the_share_of_compressed_tiles():
    ratios = np.random.default_rng(0).lognormal(size=20_000)
    labels = tile_labels(ratios, window_percentiles(ratios, 67.0, 5_000))
    assert (labels == COMPRESS).mean() == pytest.approx(0.67, abs=0.01)


def test_without_the_floor_certain_answers_would_rank_highest():
    """Median losses (full, compressed) of shapes and of three lines of text, measured in a trial."""
    full, compressed = np.array([0.0, 0.0102]), np.array([0.059, 0.446])
    small_floor = loss_ratio(compressed, full, 1e-4)
    assert small_floor[0] > small_floor[1]  # the shapes, which lose nothing, would be kept first
    np.testing.assert_allclose(loss_ratio(compressed, full, 1e-2), [6.9, 0.456 / 0.0202])


def test_a_tile_without_a_loss_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        window_percentiles(np.array([1.0, np.nan]), 50.0, 10)


def test_share_near_tau_counts_both_sides():
    ratios, taus = np.array([0.94, 0.96, 1.0, 1.04, 1.06]), np.ones(5)
    assert share_near_tau(ratios, taus) == 3 / 5
