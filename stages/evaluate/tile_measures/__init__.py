"""Measures of tiles that controls rank by: pixels, and losses of other questions about the same picture."""
