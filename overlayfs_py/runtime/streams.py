"""What flows through a monitor: the container's output to its log and to clients, their input to the container.

Nothing is dropped: while a client has too much unread, the container's output is left in its pipes, and while the
container reads none of its input, so is that of the clients.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import selectors
import socket
import struct
import termios
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from overlayfs_py.runtime import frames, logs

_PIECE = 64 << 10
_FULL = 1 << 20  # bytes that may wait for a reader

_Handler = Callable[[int], object]


@dataclass(slots=True, eq=False)
class _Client:
    connection: socket.socket
    reader: frames.Reader = field(default_factory=frames.Reader)
    unsent: bytearray = field(default_factory=bytearray)
    wants_output: bool = False
    feeds_stdin: bool = False
    events: int = 0


class Streams:
    """The container's standard streams, its log, and the clients at its socket."""

    __slots__ = (
        "_clients",
        "_home",
        "_listener",
        "_log",
        "_outputs",
        "_paused",
        "_selector",
        "_stdin",
        "_stdin_closed",
        "_stdin_ends",
        "_stdin_once",
        "_terminal",
        "_unread",
    )

    def __init__(self, log: Path, *, stdin_once: bool) -> None:
        self._selector = selectors.EpollSelector()
        self._log = logs.Writer(log)
        self._clients: list[_Client] = []
        self._home: Path | None = None
        self._listener: socket.socket | None = None
        self._outputs: dict[int, tuple[str, bytes]] = {}
        self._paused = False
        self._stdin: int | None = None
        self._stdin_closed = False
        self._stdin_ends = False
        self._terminal: int | None = None
        self._unread = bytearray()
        self._stdin_once = stdin_once

    @property
    def lost(self) -> str:
        """Why a part of the log is lost, if it is."""
        return self._log.lost

    def watch(self, fd: int, handler: _Handler) -> None:
        """Call `handler` when fd is readable."""
        self._selector.register(fd, selectors.EVENT_READ, handler)

    def listen(self, directory: Path) -> None:
        """Take clients at the socket `attach` in a directory, whatever the length of its path."""
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            (directory / "attach").unlink(missing_ok=True)
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self._listener.bind(f"/proc/self/fd/{fd}/attach")
            self._home = directory
        finally:
            os.close(fd)
        self._listener.listen(16)
        self.watch(self._listener.fileno(), self._accept)

    def add_client(self, connection: socket.socket, *, wants_output: bool = False) -> None:
        connection.setblocking(False)
        client = _Client(connection, wants_output=wants_output)
        self._clients.append(client)
        self._update(client)

    def connect(self, *, stdin: int | None, stdout: int, stderr: int | None) -> None:
        """Take over the container's ends; without a `stderr`, stdin and stdout are two descriptors of a terminal."""
        self._outputs[stdout] = ("stdout", frames.STDOUT)
        if stderr is None:
            self._terminal = stdout
        else:
            self._outputs[stderr] = ("stderr", frames.STDERR)
        for fd in self._outputs:
            os.set_blocking(fd, False)
            self.watch(fd, self._take_output)
        if stdin is None:
            self._close_stdin()
        else:
            os.set_blocking(stdin, False)
            self._stdin = stdin
            self._flush_stdin()

    def turn(self, seconds: float | None) -> None:
        """Wait for something to do, and do it."""
        for key, events in self._selector.select(seconds):
            if self._selector.get_map().get(key.fd) is not key:
                # What came before it in this turn has closed or changed it.
                continue
            if isinstance(key.data, _Client):
                self._serve(key.data, events)
            else:
                key.data(key.fd)

    def drain(self) -> None:
        """Take what the container, which has ended, left in its pipes; they hold little."""
        for fd in list(self._outputs):
            while fd in self._outputs and self._take_output(fd):
                pass

    def end(self, code: int) -> None:
        """Tell every client the exit code, and serve until each has taken all it is sent. Ends the log."""
        self.close()
        for client in list(self._clients):
            client.unsent += frames.json_frame(frames.ENDED, {"code": code})
            client.feeds_stdin = False
            self._flush(client)
        while any(client.unsent for client in self._clients):
            self.turn(None)
        for client in list(self._clients):
            self._drop(client)

    def stop_listening(self) -> None:
        """Take the clients that have come, and no more.

        The socket's name must be out of reach of others by then, or is removed here.
        """
        if self._listener is None:
            return
        if self._home is not None:
            (self._home / "attach").unlink(missing_ok=True)
        while self._accept(-1):
            pass
        self._selector.unregister(self._listener)
        self._listener.close()
        self._listener = None

    def close(self) -> None:
        """Let go of all but the clients."""
        self.stop_listening()
        for fd in list(self._outputs):
            self._close_output(fd)
        self._close_stdin()
        self._log.close()

    def _accept(self, _fd: int) -> bool:
        """Take one client; False when there is none now."""
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        self.add_client(connection)
        return True

    def _take_output(self, fd: int) -> bool:
        """Pass on one piece; False when there is none now."""
        try:
            data = os.read(fd, _PIECE)
        except BlockingIOError:
            return False
        except OSError as error:
            # A terminal whose last user is gone.
            if error.errno != errno.EIO:
                raise
            data = b""
        if not data:
            self._close_output(fd)
            return False
        stream, kind = self._outputs[fd]
        self._log.write(stream, data)
        piece = frames.frame(kind, data)
        for client in list(self._clients):
            if client.wants_output:
                client.unsent += piece
                self._flush(client)
        self._pace()
        return True

    def _close_output(self, fd: int) -> None:
        if fd in self._selector.get_map():
            self._selector.unregister(fd)
        del self._outputs[fd]
        if fd == self._terminal:
            self._terminal = None
        os.close(fd)

    def _pace(self) -> None:
        """Leave the container's output where it is while a client has too much unread."""
        full = any(len(client.unsent) > _FULL for client in self._clients)
        if full == self._paused:
            return
        self._paused = full
        for fd in self._outputs:
            if full:
                self._selector.unregister(fd)
            else:
                self.watch(fd, self._take_output)

    def _serve(self, client: _Client, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(client)
            self._pace()
        if events & selectors.EVENT_READ and client in self._clients:
            self._hear(client)

    def _hear(self, client: _Client) -> None:
        try:
            data = client.connection.recv(_PIECE)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._drop(client)
            return
        try:
            for kind, content in client.reader.feed(data):
                self._obey(client, kind, content)
        except (frames.BadFrame, ValueError, struct.error):
            self._drop(client)

    def _obey(self, client: _Client, kind: bytes, content: bytes) -> None:
        if kind == frames.HELLO:
            wishes = json.loads(content)
            client.wants_output = bool(wishes.get("output"))
            client.feeds_stdin = bool(wishes.get("stdin"))
        elif kind == frames.STDIN and client.feeds_stdin:
            if not self._stdin_closed:
                self._unread += content
                self._flush_stdin()
        elif kind == frames.END_OF_STDIN and client.feeds_stdin:
            self._end_stdin()
        elif kind == frames.WINDOW and self._terminal is not None:
            rows, columns = frames.WINDOW_SIZE.unpack(content)
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _flush(self, client: _Client) -> None:
        while client.unsent:
            try:
                sent = client.connection.send(client.unsent)
            except BlockingIOError:
                break
            except (BrokenPipeError, ConnectionResetError):
                self._drop(client)
                return
            del client.unsent[:sent]
        self._update(client)

    def _update(self, client: _Client) -> None:
        """Watch for what can be done for a client now."""
        events = selectors.EVENT_WRITE if client.unsent else 0
        if not (client.feeds_stdin and len(self._unread) > _FULL):
            events |= selectors.EVENT_READ
        if events == client.events:
            return
        if client.events and events:
            self._selector.modify(client.connection, events, client)
        elif events:
            self._selector.register(client.connection, events, client)
        else:
            self._selector.unregister(client.connection)
        client.events = events

    def _drop(self, client: _Client) -> None:
        self._clients.remove(client)
        if client.events:
            self._selector.unregister(client.connection)
        client.connection.close()
        if client.feeds_stdin:
            self._end_stdin()
        self._pace()

    def _end_stdin(self) -> None:
        if self._stdin_once and self._terminal is None:
            self._stdin_ends = True
            self._flush_stdin()

    def _flush_stdin(self, _fd: int = -1) -> None:
        """Feed the container; `_unread` keeps what it does not take yet, also before it is connected."""
        if self._stdin is None:
            return
        while self._unread:
            try:
                written = os.write(self._stdin, self._unread)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):
                    raise
                # It reads no more, so what comes further has no reader.
                self._close_stdin()
                return
            del self._unread[:written]
        if self._stdin_ends and not self._unread:
            self._close_stdin()
        else:
            self._wait_for_stdin()
        for client in list(self._clients):
            self._update(client)

    def _wait_for_stdin(self) -> None:
        """Watch whether the container takes more, while there is more."""
        assert self._stdin is not None
        watched = self._stdin in self._selector.get_map()
        if self._unread and not watched:
            self._selector.register(self._stdin, selectors.EVENT_WRITE, self._flush_stdin)
        elif watched and not self._unread:
            self._selector.unregister(self._stdin)

    def _close_stdin(self) -> None:
        if self._stdin is not None:
            if self._stdin in self._selector.get_map():
                self._selector.unregister(self._stdin)
            os.close(self._stdin)
            self._stdin = None
        self._stdin_closed = True
        self._unread.clear()
