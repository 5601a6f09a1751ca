"""Floor 9: the trainers, their checkpoints and their checks."""
