"""Layer 1: tensors in, tensors out."""
