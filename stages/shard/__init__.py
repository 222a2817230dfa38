"""Stage shard: checked samples in WebDataset tars with an index; rows repaired later."""
