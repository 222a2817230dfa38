"""The shard stage: checked samples in WebDataset tars with an index, and shards of rows repaired later."""
