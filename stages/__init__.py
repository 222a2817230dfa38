"""The stages, one folder each; what they share; the context their runner gives them."""
