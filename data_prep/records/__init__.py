"""Records in the formats that users bring (InternVL, LLaVA, parquet, tars, demo), read as uniform rows."""
