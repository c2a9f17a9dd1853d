"""Processes that stay the same one: a pid counts only together with its start time and the boot it belongs to."""

from __future__ import annotations

import os
import select
import signal
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None where there is no such process. Source: proc_pid_stat(5)."""
    try:
        return Path("/proc", str(pid), "stat").read_bytes().rpartition(b") ")[2].decode().split()
    except (FileNotFoundError, ProcessLookupError):
        return None


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this machine: its pid, its start in clock ticks since the boot, and the boot's id."""

    pid: int
    start: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this pid now; None where none has."""
        fields = _stat(pid)
        return None if fields is None else cls(pid, int(fields[19]), _boot())

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        if self.boot != _boot():
            return False
        fields = _stat(self.pid)
        return fields is not None and int(fields[19]) == self.start and fields[0] not in "ZX"

    def open(self) -> int | None:
        """A pidfd of it, close-on-exec; None where it has ended. Source: pidfd_open(2)."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if self.alive():
            return fd
        os.close(fd)
        return None

    def send(self, number: int) -> bool:
        """Send a signal; False where the process has ended. Raises PermissionError."""
        fd = self.open()
        if fd is None:
            return False
        try:
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it ends, at most so many seconds; whether it has."""
        fd = self.open()
        if fd is None:
            return True
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            return bool(poll.poll(None if seconds is None else seconds * 1000))
        finally:
            os.close(fd)
