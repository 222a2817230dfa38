"""Reading runs: their logs, what differs between two, how to make one again."""
