"""What identifies a result (fingerprints, digests of files and inputs) and what is recorded beside it."""
