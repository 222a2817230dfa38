"""Which samples of a split a stage looks at when its config allows only some of them."""

import numpy as np

from data_prep.draws import draw_order


def chosen_rows(rows: np.ndarray, max_samples: int, seed: int) -> np.ndarray:
    """At most `max_samples` of the row numbers (0: all), in index order, drawn by seed.

    A smaller choice lies within a larger one of the same seed, so stages with different limits still look at
    the same samples, and rows that one of them cannot use leave the others where they are.
    """
    if not max_samples or len(rows) <= max_samples:
        return np.sort(rows)
    return np.sort(rows[draw_order("choice of samples", seed, rows)[:max_samples]])
