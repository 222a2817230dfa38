"""What is trained: the consistency and router objectives, labels from loss ratios, their cost."""
