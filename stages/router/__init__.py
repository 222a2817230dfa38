"""Stage router: train the router on the labels of tiles, then calibrate its absolute threshold."""
