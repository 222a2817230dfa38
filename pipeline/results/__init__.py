"""What a storage holds: stage folders and their records, runs, metrics, and what no run needs."""
