"""Pictures and other media of rows, known by their names and bytes: kinds, inline base64, quick headers."""
