"""Layer 6: statistics of gradients, block by block, so that the model may be larger than the memory."""
