"""The ViCO method: tiling, prompts, connectors, router, model, packing, losses, ratios, routing and checkpoint layouts."""
