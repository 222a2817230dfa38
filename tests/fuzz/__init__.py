"""Hostile files for everything that reads what others wrote: `python -m tests.fuzz --minutes 30`."""
