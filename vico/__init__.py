"""The ViCO method: model, losses, labels and routing; independent of pipelines, clusters and their files."""
