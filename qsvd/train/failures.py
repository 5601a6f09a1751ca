"""What ends a training run by itself."""


class TrainingStopped(Exception):
    """The run cannot go on: an absurd start, a loss that is no number. What was saved before is kept."""
