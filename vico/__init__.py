"""The ViCO method: what is learnt and computed, free of pipelines, clusters and files of theirs."""
