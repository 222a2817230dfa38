"""From records to checked samples, WebDataset tars with an index, and planned packs. No Ray here."""
