"""What a storage contains: stage folders and their records, runs, metrics, and what no run needs."""
