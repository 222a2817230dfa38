"""Stage label: from losses per tile to keep or compress."""
