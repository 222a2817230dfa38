"""The network: vision tower, connectors, router, language model, attention over packed segments."""
