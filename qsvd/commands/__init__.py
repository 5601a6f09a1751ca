"""Floor 12: one file for each command. Prints and reads the clock."""
