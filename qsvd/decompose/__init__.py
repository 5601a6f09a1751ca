"""Floor 2: one weight in, one Split and its error out."""
