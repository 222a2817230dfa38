"""Using a model: losses per tile, routing rules, generation, scoring, a picture with its routed tiles."""
