"""Rows as users bring them (InternVL, LLaVA, parquet, tars, demo), read into one form."""
