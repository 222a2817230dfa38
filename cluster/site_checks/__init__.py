"""`vico site check`: what a site must offer before a run is submitted to it, asked of every node."""
