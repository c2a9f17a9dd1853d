"""Published ports: a process that listens on the host and passes on what comes to the container's address.

What it does with them is in `proxy`.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import socket
from collections.abc import Sequence

from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.spec import Port
from overlayfs_py.sys import namespaces
from overlayfs_py.sys.descriptors import close_all_but

_ATTEMPTS = 10


def bind(ports: Sequence[Port]) -> list[tuple[socket.socket, Port]]:
    """A bound socket for each port, and the port with its number where any would do. Raises ContainerError."""
    bound: list[tuple[socket.socket, Port]] = []
    try:
        for port in ports:
            bound += [_bind(port)] if port.address else _bind_everywhere(port)
    except OSError as error:
        for made, _ in bound:
            made.close()
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise ContainerError(f"cannot publish port {port}: {reason}") from error
    return bound


def _bind_everywhere(port: Port) -> list[tuple[socket.socket, Port]]:
    """The same number for IPv4 and, where the machine has it, for IPv6."""
    left = _ATTEMPTS
    while True:
        left -= 1
        first = _bind(dataclasses.replace(port, address="0.0.0.0"))
        try:
            return [first, _bind(dataclasses.replace(first[1], address="::"))]
        except OSError as error:
            if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                return [first]
            first[0].close()
            # One that is free for IPv4 alone was no choice of the user's.
            if error.errno != errno.EADDRINUSE or port.host or not left:
                raise


def _bind(port: Port) -> tuple[socket.socket, Port]:
    family = socket.AF_INET6 if ":" in port.address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM)
    try:
        if port.protocol == "tcp":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((port.address, port.host))
        if port.protocol == "tcp":
            made.listen(128)
    except BaseException:
        made.close()
        raise
    return made, Port(made.getsockname()[1], port.container, port.protocol, port.address)


def start(sockets: Sequence[tuple[socket.socket, Port]], address: str) -> int:
    """Serve the sockets from a process that ends with this one; returns its pid. The sockets are closed here."""
    child = os.fork()
    if child == 0:
        try:
            namespaces.die_with_parent(signal.SIGKILL)
            namespaces.set_name(b"ovl-proxy")
            close_all_but({made.fileno() for made, _ in sockets})
            for number in (
                signal.SIGHUP,
                signal.SIGINT,
                signal.SIGTERM,
                signal.SIGUSR1,
                signal.SIGUSR2,
                signal.SIGCHLD,
            ):
                signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            # Loaded by this process alone, since it takes longer than the start of a container.
            from overlayfs_py.runtime import proxy

            proxy.serve(sockets, address)
        finally:
            os._exit(1)
    for made, _ in sockets:
        made.close()
    return child
