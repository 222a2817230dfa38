"""Stage evaluate: quality against visual tokens for the router and its controls, as tables and plots."""
