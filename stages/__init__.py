"""The stages, one folder each, with what they share and the context that the runner gives them."""
