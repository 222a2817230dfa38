"""Using a model: losses per tile, routing, generation, scoring, a picture with its tiles drawn."""
