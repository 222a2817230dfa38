"""Memory of a training, computed from a config.json before anything runs: no torch, no weights."""
