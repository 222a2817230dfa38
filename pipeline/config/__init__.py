"""The pipeline file: reading YAML, its typed model, the graph of stages, messages for wrong fields."""
