"""Floor 9: perplexity, divergence, accuracy, exact match."""
