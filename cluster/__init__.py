"""Where a command runs: site files, Ray sessions, remote tasks, jobs, and the load of a node."""
