"""The network: vision tower, both connectors, router, language model, attention over packed segments."""
