"""Floor 5: the files that are read and written, and their names."""
