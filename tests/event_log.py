"""A callback for tests: what came, in which order; and a fault at a chosen moment."""
from exp.callbacks import EVENTS


class Log:
    "Keeps every event as it comes, and raises `error` at the `nth` time that `at` comes."
    def __init__(self, at=None, error=None, nth=1): self.seen, self.at, self.error, self.nth = [], at, error, nth


def _event(self, run, name=None):
    self.seen.append(name)
    if name == self.at and self.seen.count(name) == self.nth: raise self.error()


for e in EVENTS: setattr(Log, e, lambda self, run, e=e: _event(self, run, e))
