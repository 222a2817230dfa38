"""The built-in demo records: real pictures and text from installed packages."""
