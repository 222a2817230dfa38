"""Stage rates: the rate that a router chooses for every train tile, for the joint training."""
