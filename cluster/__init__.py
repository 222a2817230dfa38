"""Where a command runs: site files, Ray, remote tasks, jobs, and the load of a node."""
