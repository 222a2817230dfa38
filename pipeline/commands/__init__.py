"""One file per group of `vico` commands: options, what they call, and the tables they print."""
