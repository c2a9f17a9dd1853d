"""Passing on what comes to published ports.

TCP connections keep their half-closes; a UDP client has a socket of its own, so that answers find it, until there were
none for a while.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
from collections.abc import Sequence
from typing import Any

import trio

from overlayfs_py.runtime.spec import Port

_PIECE = 256 << 10  # bytes
_DATAGRAM = 65535
_QUIET = 90.0  # seconds
_PATIENCE = 5.0  # seconds that the container's port has to take a connection
_PAUSE = 0.1  # seconds
_SHORT_OF = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


def serve(sockets: Sequence[tuple[socket.socket, Port]], address: str) -> None:
    """Pass on what comes to these bound sockets to the container's ports at its address, for ever."""
    trio.run(functools.partial(_serve, sockets, address))


async def _serve(sockets: Sequence[tuple[socket.socket, Port]], address: str) -> None:
    async with trio.open_nursery() as nursery:
        for made, port in sockets:
            made.setblocking(False)
            one = _tcp if port.protocol == "tcp" else _udp
            nursery.start_soon(one, trio.socket.from_stdlib_socket(made), (address, port.container))


async def _tcp(listener: trio.socket.SocketType, target: tuple[str, int]) -> None:
    async with trio.open_nursery() as nursery:
        while True:
            try:
                connection, _ = await listener.accept()
            except OSError as error:
                # Other errors mean that the client was gone before it was taken; accept(2).
                if error.errno in _SHORT_OF:
                    await trio.sleep(_PAUSE)
                continue
            nursery.start_soon(_connect, trio.SocketStream(connection), target)


async def _connect(outside: trio.SocketStream, target: tuple[str, int]) -> None:
    async with outside:
        try:
            with trio.fail_after(_PATIENCE):
                inside = await trio.open_tcp_stream(*target)
        except (OSError, trio.TooSlowError):
            # Nobody listens in there: the client sees its connection end.
            return
        async with inside, trio.open_nursery() as nursery:
            nursery.start_soon(_one_way, outside, inside, nursery.cancel_scope)
            nursery.start_soon(_one_way, inside, outside, nursery.cancel_scope)


async def _one_way(source: trio.SocketStream, target: trio.SocketStream, both: trio.CancelScope) -> None:
    try:
        while data := await source.receive_some(_PIECE):
            await target.send_all(data)
        await target.send_eof()
    except trio.BrokenResourceError:
        both.cancel()


async def _udp(outside: trio.socket.SocketType, target: tuple[str, int]) -> None:
    clients: dict[Any, trio.socket.SocketType] = {}
    async with trio.open_nursery() as nursery:
        while True:
            data, client = await outside.recvfrom(_DATAGRAM)
            # A datagram may be lost, so one that can't be passed on is.
            with contextlib.suppress(OSError):
                if client not in clients:
                    inside = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                    await inside.connect(target)
                    clients[client] = inside
                    nursery.start_soon(_answers, clients, client, outside)
                await clients[client].send(data)


async def _answers(clients: dict[Any, trio.socket.SocketType], client: Any, outside: trio.socket.SocketType) -> None:
    inside = clients[client]
    with inside:
        heard = True
        while heard:
            heard = False
            with trio.move_on_after(_QUIET):
                # ECONNREFUSED: nobody listens in there yet.
                with contextlib.suppress(OSError):
                    await outside.sendto(await inside.recv(_DATAGRAM), client)
                heard = True
        del clients[client]
