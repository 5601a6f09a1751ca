"""The embedded model and its texts."""
