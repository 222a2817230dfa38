"""What a server is started with: its settings, the model that it opens, and the engine over the model."""
