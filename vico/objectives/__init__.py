"""What is trained and measured: the consistency loss, loss ratios and labels, the router's loss, FLOPs."""
