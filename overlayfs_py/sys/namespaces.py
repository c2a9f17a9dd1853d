"""Namespaces, and who adopts and ends processes."""

import ctypes

from overlayfs_py.sys.libc import LIBC, last_error

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36


def unshare(flags: int) -> None:
    """Move this process into new namespaces, as the CLONE_NEW* bits say. Source: unshare(2)."""
    if LIBC.unshare(flags) != 0:
        raise last_error()


def setns(fd: int, flags: int) -> None:
    """Move this process into the namespace that `fd` refers to, of the kind CLONE_NEW*. Source: setns(2)."""
    if LIBC.setns(fd, flags) != 0:
        raise last_error()


def become_subreaper() -> None:
    """Orphaned descendants become children of this process. Source: prctl(2), PR_SET_CHILD_SUBREAPER."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(signal: int) -> None:
    """Get `signal` when the thread that made this process ends. Source: PR_SET_PDEATHSIG(2const)."""
    _prctl(_PR_SET_PDEATHSIG, signal)


def set_name(name: bytes) -> None:
    """What ps(1) shows of this thread, up to 15 bytes. Source: PR_SET_NAME(2const)."""
    if LIBC.prctl(_PR_SET_NAME, ctypes.c_char_p(name), 0, 0, 0) != 0:
        raise last_error()


def _prctl(option: int, value: int) -> None:
    if LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise last_error()
