"""The compiled halves of signal and socket, and passing a descriptor with them.

Their other halves bring in enum, selectors and what these need, which took a mount longer than all that is done here.
"""

from __future__ import annotations

import sys

__all__ = ["receive_descriptor", "send_descriptor", "signal", "socket"]

TYPE_CHECKING = False

if TYPE_CHECKING:
    import signal as signal
    import socket as socket
else:
    try:
        import _signal as signal
        import _socket as socket
    except ImportError:
        import socket

_INT = 4  # bytes of a descriptor in a message


def send_descriptor(channel: socket.socket, word: bytes, descriptor: int) -> None:
    """Send a word and a descriptor with it, which stays open here. Source: unix(7), SCM_RIGHTS."""
    rights = descriptor.to_bytes(_INT, sys.byteorder)
    channel.sendmsg([word], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def receive_descriptor(channel: socket.socket, most: int) -> tuple[bytes, int | None]:
    """A word of at most `most` bytes, and the descriptor that came with it, close-on-exec, or None."""
    word, messages, _, _ = channel.recvmsg(most, socket.CMSG_SPACE(_INT), socket.MSG_CMSG_CLOEXEC)
    for level, kind, rights in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS and len(rights) >= _INT:
            return word, int.from_bytes(rights[:_INT], sys.byteorder)
    return word, None
