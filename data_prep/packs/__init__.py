"""The plan of packs: which samples share a micro-batch, in which order, and the rate of every tile."""
