"""Training with Ray Train and DeepSpeed: loop, checkpoints, failures, speed. Used by two stages."""
