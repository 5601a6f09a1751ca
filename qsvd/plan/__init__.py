"""Layer 3: arithmetic before work; needs shapes, never weights."""
