"""Plans for several GPUs, for people and as JSON."""
