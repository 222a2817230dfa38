"""Disjoint sets of numbers, joined many at a time."""

import numpy as np


class DisjointSets:
    """Sets of the numbers 0 to n - 1, each known by its smallest number, its root.

    Paths to a root stay short without a rank per number if numbers are in random order (linking by random
    index), such as positions among sorted digests, or if all joins of a set are with the same number.
    """

    def __init__(self, n: int) -> None:
        self._parents = np.arange(n)

    def roots(self, numbers: np.ndarray) -> np.ndarray:
        """Return the root of each number, and shorten its path."""
        roots = self._parents[numbers]
        while not np.array_equal(above := self._parents[roots], roots):
            roots = above
        self._parents[numbers] = roots
        return roots

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Join the sets of left[i] and right[i], for every i."""
        while len(left):
            a, b = self.roots(left), self.roots(right)
            np.minimum.at(self._parents, np.maximum(a, b), np.minimum(a, b))
            left, right = left[a != b], right[a != b]
