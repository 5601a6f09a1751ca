"""Layer 7: rows of a file become trained tokens, and a model learns them."""
