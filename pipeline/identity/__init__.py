"""What makes a result the same: fingerprints, digests of files and inputs, sources, provenance."""
