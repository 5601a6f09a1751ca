"""Floor 11: what commands share: progress, Ctrl-C, the record of a training run. Prints and reads the clock."""
