"""What ends a command early, and its exit code: 0 done, 1 failed while running, 2 bad input, 3 does not fit,
130 interrupted."""


class DoesNotFit(Exception):
    """There is not enough disk or memory for the work, known before it starts."""


class Interrupted(Exception):
    """The user asked to stop; what is finished is kept."""
