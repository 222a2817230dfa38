"""Checks that files, digests, lineage, metrics and MLflow are still what the records say."""
