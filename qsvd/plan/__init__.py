"""Floor 3: what every weight becomes. Needs shapes, never weights."""
