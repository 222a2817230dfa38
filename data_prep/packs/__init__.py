"""The plan of packs: which samples share a micro-batch, in which order, at which rates."""
