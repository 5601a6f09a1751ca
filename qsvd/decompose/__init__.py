"""Layer 2: one weight in, one Split out, with its error."""
