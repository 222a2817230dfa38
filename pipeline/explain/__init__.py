"""Commands that explain runs: what differs, how a run is reproduced, what it logged."""
