"""Waiting for what comes about by itself."""

import time
from collections.abc import Callable


def wait_until(done: Callable[[], bool], limit: float = 20.0) -> None:
    """Return once `done` says so; raises AssertionError where it doesn't within `limit` seconds."""
    deadline = time.monotonic() + limit
    while not done():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)
