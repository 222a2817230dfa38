"""Sending work to a site: `vico submit`, `vico cancel` and `vico site check`."""
