"""Stage consistency: the policy learns to answer like its frozen reference at mixed rates of its tiles."""
