"""Floor 8: rows of a file become tokens and labels."""
