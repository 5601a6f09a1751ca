"""Runs that end early: what shows progress raises."""


class Stopped(Exception):
    """The run was to end here."""


class StopAfter:
    """Shows progress by keeping it in `seen`, and raises Stopped at call number `last`."""

    def __init__(self, last: int | None = None):
        self.last, self.seen = last, []

    def __call__(self, progress):
        self.seen.append(progress)
        if len(self.seen) == self.last:
            raise Stopped
