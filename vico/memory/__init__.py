"""Sizes of a model and memory of its training, by config.json before anything runs: no torch, no weights."""
