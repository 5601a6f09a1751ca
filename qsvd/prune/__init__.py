"""Structured pruning of a 16-bit model: `qsvd prune`."""
