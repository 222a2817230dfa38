"""Samples in tars: checks, splits, leaks, writing, the index, reading and caching."""
