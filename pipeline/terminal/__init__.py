"""What the commands show: lines, tables, progress and JSON. Nothing else writes to the terminal."""
