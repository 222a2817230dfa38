"""vLLM as the language model of `vico serve`: its process, and the decoder that asks it."""
