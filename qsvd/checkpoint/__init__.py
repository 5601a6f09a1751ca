"""Layer 4: names and files."""
