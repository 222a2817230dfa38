"""Formats whose files hold rows together with their pictures: WebDataset tars and parquet."""
