"""What a command would do: the tasks of a config, whether each is reused or run, why, at what cost."""
