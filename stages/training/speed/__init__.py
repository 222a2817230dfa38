"""How fast a training is: the parts of a step, traces, and updates measured before it begins."""
