"""Stage router: the router learns the labels; its threshold is calibrated."""
