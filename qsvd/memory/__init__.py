"""Floor 4: memory and time of a task, estimated by item before it runs."""
