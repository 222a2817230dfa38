"""Stage ratio: the loss of every sample with each of its tiles compressed."""
