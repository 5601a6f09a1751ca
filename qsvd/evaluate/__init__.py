"""Layer 8: what a model is worth: perplexity."""
