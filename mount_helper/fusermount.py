"""FUSE mounts for users who may not mount, through the set-user-ID program fusermount3; fusermount3(1)."""

from __future__ import annotations

import os

from mount_helper.lean import receive_descriptor, socket
from mount_helper.request import SUBTYPE, HelperError, Request

_PROGRAMS = ("fusermount3", "fusermount")

# Of the flags of mount(2), those that fusermount3 takes from users; it adds nosuid and nodev itself.
_FLAGS = {1: b"ro", 8: b"noexec", 16: b"sync", 128: b"dirsync", 1024: b"noatime"}


def mount(request: Request) -> int:
    """Have the request mounted; returns the descriptor of the FUSE connection.

    fusermount3 sends the descriptor over the socket that _FUSE_COMMFD names. Raises HelperError.
    """
    options = [b"fsname=" + request.source.replace(b"\\", b"\\\\").replace(b",", b"\\,"), b"subtype=" + SUBTYPE]
    options += request.fuse_options()
    options += [word for flag, word in _FLAGS.items() if request.flags & flag]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _run([b"-o", b",".join(options), b"--", request.mountpoint], theirs.fileno())
        theirs.close()
        _, descriptor = receive_descriptor(ours, 1)
    finally:
        ours.close()
        theirs.close()
    if descriptor is None:
        raise HelperError("fusermount3 sent no descriptor")
    return descriptor


def unmount(mountpoint: bytes, *, lazy: bool) -> None:
    """Have a mount of the calling user unmounted. Raises HelperError."""
    _run([b"-u", *([b"-z"] if lazy else []), b"--", mountpoint])


def _run(arguments: list[bytes], channel: int | None = None) -> None:
    # Of no use to root, whose mounts are not to wait for it.
    import subprocess

    environment = {**os.environb, b"LC_ALL": b"C"}
    kept: tuple[int, ...] = ()
    if channel is not None:
        environment[b"_FUSE_COMMFD"] = b"%d" % channel
        kept = (channel,)
    for program in _PROGRAMS:
        try:
            done = subprocess.run(
                [program, *arguments],
                env=environment,
                pass_fds=kept,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
            )
        except FileNotFoundError:
            continue
        if done.returncode != 0:
            said = " ".join(done.stderr.decode(errors="backslashreplace").split())
            raise HelperError(said or f"{program} failed with status {done.returncode}")
        return
    raise HelperError("mounting takes root or fusermount3; install the package fuse3")
