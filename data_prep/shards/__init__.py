"""Samples in tars: row checks, splits, leaks between splits, writing, the index, reading and caching."""
