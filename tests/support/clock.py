"""A clock for what a callback does or leaves out by how long it has taken."""


class Clock:
    """Every look at it takes a second, and so does whatever is measured with it."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 1
        return self.now
