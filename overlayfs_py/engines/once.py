"""Something that happens once, which threads wait for; as threading.Event, which takes long to load."""

from __future__ import annotations

from _thread import allocate_lock


class Once:
    """Happens at the first and only call of `happen`."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._lock.acquire()

    def happen(self) -> None:
        """It has happened; said once."""
        self._lock.release()

    def has_happened(self) -> bool:
        """Whether it has; false, too, for the moment in which another thread finds out."""
        return not self._lock.locked()

    def wait(self, seconds: float = -1) -> bool:
        """Wait until it has happened, for so long at most (-1: for ever); whether it has."""
        if not self._lock.acquire(timeout=seconds):
            return False
        self._lock.release()
        return True
