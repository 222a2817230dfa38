"""`vico report`: one HTML page about a run, made from the files of its storage alone."""
