"""Layer 8: what a model is worth: perplexity, held-out loss, accuracy, exact match, divergence from another model."""
