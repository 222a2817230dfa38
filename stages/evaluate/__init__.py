"""Stage evaluate: quality against tokens for the routed model and its controls; tables, figures."""
