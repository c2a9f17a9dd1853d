"""Many files synced at once, so that one commit of their disk's journal, and one flush of its cache, serves all."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from overlayfs_py.sys.libc import LIBC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# io_setup, io_destroy, io_submit and io_getevents by the machine's name, as uname(2) has it; all of 64 bits.
_GENERIC = (0, 1, 2, 4)
_NUMBERS = {"x86_64": (206, 207, 209, 208), "aarch64": _GENERIC, "riscv64": _GENERIC, "loongarch64": _GENERIC}

_IOCB_CMD_FSYNC = 2
# struct iocb: data, key, flags, opcode, priority, descriptor, buffer, length, offset, nothing, flags, eventfd.
_IOCB = struct.Struct("=QIIHhIQQqQII")
# struct io_event: data, the address of the iocb, result, a second result.
_EVENT = struct.Struct("=QQqq")

_SYNC_FILE_RANGE_WRITE = 2

_sync_file_range = LIBC.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_sync_file_range.restype = ctypes.c_int

_syscall = LIBC.syscall


def begin(fd: int, offset: int = 0, size: int = 0) -> None:
    """Have the disk begin to write `size` bytes of a file, 0 for all of them, without waiting for it.

    Whatever keeps it from that, the sync meets again and tells. Source: sync_file_range(2).
    """
    _sync_file_range(fd, offset, size, _SYNC_FILE_RANGE_WRITE)


class Syncs:
    """A queue of the kernel's for at most `most` syncs at once, or none where it has none to give.

    Source: io_submit(2), whose syncs the kernel does side by side since Linux 4.18.
    """

    __slots__ = ("_context", "_most", "_numbers")

    def __init__(self, most: int) -> None:
        self._most = most
        self._context = ctypes.c_ulong(0)
        self._numbers = _NUMBERS.get(os.uname().machine) if struct.calcsize("P") == struct.calcsize("Q") else None
        if self._numbers is not None and self._call(self._numbers[0], most, ctypes.byref(self._context)) < 0:
            # too many of them on this machine (aio-max-nr), or forbidden to this process
            self._numbers = None

    def sync(self, fds: Sequence[int]) -> list[OSError | None]:
        """fsync(2) of each; the answer is what went wrong, in the same order. One user at a time.

        EIO for those of which the kernel doesn't tell what became.
        """
        outcome: list[OSError | None] = [None] * len(fds)
        begun = 0 if self._numbers is None else self._submit(self._numbers[2], fds[: self._most])
        for index in range(begun, len(fds)):
            try:
                os.fsync(fds[index])
            except OSError as error:
                outcome[index] = error
        if self._numbers is not None and begun and not self._wait(self._numbers[3], begun, outcome):
            # A sync that failed is told once: another one of the same file would succeed.
            outcome[:begun] = [OSError(errno.EIO, os.strerror(errno.EIO)) for _ in range(begun)]
        return outcome

    def _submit(self, number: int, fds: Sequence[int]) -> int:
        """How many have been begun; the others are to be synced in another way."""
        blocks = b"".join(
            _IOCB.pack(index, 0, 0, _IOCB_CMD_FSYNC, 0, fd, 0, 0, 0, 0, 0, 0) for index, fd in enumerate(fds)
        )
        memory = ctypes.create_string_buffer(blocks, len(blocks))
        first = ctypes.addressof(memory)
        addresses = (ctypes.c_void_p * len(fds))(*[first + index * _IOCB.size for index in range(len(fds))])
        return max(0, self._call(number, self._context, len(fds), addresses))

    def _wait(self, number: int, begun: int, outcome: list[OSError | None]) -> bool:
        """Note what became of those that have been begun; False where the kernel won't tell: the queue is gone then."""
        events = ctypes.create_string_buffer(begun * _EVENT.size)
        done = 0
        while done < begun:
            count = self._call(number, self._context, begun - done, begun - done, events, None)
            if count < 0:
                if ctypes.get_errno() == errno.EINTR:
                    continue
                self.close()
                return False
            for index, _, result, _ in _EVENT.iter_unpack(events.raw[: count * _EVENT.size]):
                if result < 0:
                    outcome[index] = OSError(-result, os.strerror(-result))
            done += count
        return True

    @staticmethod
    def _call(number: int, *arguments: object) -> int:
        return int(_syscall(ctypes.c_long(number), *arguments))

    def close(self) -> None:
        """Give the queue back, when all that has been begun is done."""
        if self._numbers is not None:
            self._call(self._numbers[1], self._context)
            self._numbers = None
