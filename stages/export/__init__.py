"""Stage export: the model folder that is published, with its model card."""
