"""Floor 9: statistics of gradients, block by block."""
