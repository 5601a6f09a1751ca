"""Floor 10: options in, a checked run out. Everything that is refused before work is refused here."""
