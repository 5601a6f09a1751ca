"""Layer 10: where layers meet; opens user paths, prints, reads the clock."""
