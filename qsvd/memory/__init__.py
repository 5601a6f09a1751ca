"""Floor 4: where everything fits, by item, before any work."""
