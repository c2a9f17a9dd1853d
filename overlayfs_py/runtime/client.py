"""A client of a monitor: joins the streams of this process with those of a container."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import selectors
import signal
import socket
import stat
import termios
import tty
from collections.abc import Callable, Iterator

from overlayfs_py.runtime import frames
from overlayfs_py.runtime.signals import FORWARDED
from overlayfs_py.runtime.state import Container

_PIECE = 64 << 10
_DETACH = b"\x10\x11"  # Ctrl-P Ctrl-Q


class Detached(Exception):
    """The user pressed the keys to leave the container running."""


class OutputClosed(Exception):
    """Nobody reads our standard output any more."""


class HungUp(Exception):
    """Our terminal is gone."""


def connect(container: Container) -> socket.socket | None:
    """A connection to the container's monitor; None where there is none (any more)."""
    try:
        fd = os.open(container.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(f"/proc/self/fd/{fd}/attach")
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    finally:
        os.close(fd)
    return connection


def await_end(connection: socket.socket) -> int | None:
    """The exit code that the monitor tells; None if it ends without."""
    return _Session(connection, stdin=None, terminal=False, forward=None).run()


def attach(
    connection: socket.socket, *, stdin: bool, terminal: bool, forward: Callable[[int], None] | None
) -> int | None:
    """Join standard input (if `stdin`), output and error with the container's until it ends; returns the exit code.

    With a `terminal` ours is put in raw mode meanwhile. Signals that come are given to `forward`. None: the monitor was
    killed. Raises Detached, OutputClosed and HungUp.
    """
    with contextlib.ExitStack() as stack:
        if terminal and stdin and os.isatty(0):
            stack.enter_context(_raw(0))
        session = _Session(connection, stdin=0 if stdin else None, terminal=terminal, forward=forward)
        session.send(frames.json_frame(frames.HELLO, {"output": True, "stdin": stdin}))
        return session.run()


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)
    try:
        yield
    finally:
        try:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
        except termios.error as error:
            # EIO: the terminal is gone.
            if error.args[0] != errno.EIO:
                raise


class _Session:
    """One client until its end."""

    __slots__ = (
        "_code",
        "_connection",
        "_forward",
        "_keys",
        "_reader",
        "_selector",
        "_stdin",
        "_terminal",
        "_unsent",
        "_wakeup",
    )

    def __init__(
        self, connection: socket.socket, *, stdin: int | None, terminal: bool, forward: Callable[[int], None] | None
    ) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._stdin = stdin
        self._terminal = terminal
        self._forward = forward
        self._reader = frames.Reader()
        self._keys = b""
        self._unsent = bytearray()
        self._code: int | None = None
        self._wakeup, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # select(2) takes regular files, as standard input may be one; epoll(7) does not.
        self._selector = selectors.SelectSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        if forward is not None:
            signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
            for number in (*FORWARDED, signal.SIGWINCH):
                signal.signal(number, lambda _number, _frame: None)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (*FORWARDED, signal.SIGWINCH))

    def run(self) -> int | None:
        if self._terminal:
            self._send_window()
        self._watch_stdin()
        while True:
            for key, events in self._selector.select():
                if key.fd == self._wakeup:
                    self._take_signals()
                elif key.fd == self._stdin:
                    self._take_input()
                else:
                    if events & selectors.EVENT_WRITE:
                        self._flush()
                    if events & selectors.EVENT_READ and not self._take_frames():
                        return self._code

    def _take_frames(self) -> bool:
        """Whether more will come."""
        try:
            data = self._connection.recv(_PIECE)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            data = b""
        for kind, content in self._reader.feed(data):
            if kind == frames.ENDED:
                self._code = int(json.loads(content)["code"])
            else:
                _write(1 if kind == frames.STDOUT else 2, content)
        return bool(data) and self._code is None

    def _take_input(self) -> None:
        assert self._stdin is not None
        try:
            data = os.read(self._stdin, _PIECE)
        except OSError as error:
            # The terminal is gone, or is not ours to read as we are in the background.
            if error.errno != errno.EIO:
                raise
            data = b""
        if not data and self._terminal:
            # In raw mode there is no key for the end of input.
            raise HungUp
        if not data:
            self._selector.unregister(self._stdin)
            self._stdin = None
            self.send(frames.frame(frames.END_OF_STDIN))
            return
        if self._terminal:
            data = self._without_detach_keys(data)
        if data:
            self.send(frames.frame(frames.STDIN, data))

    def _without_detach_keys(self, data: bytes) -> bytes:
        """What to pass on; the first of the two keys waits for what comes next. Raises Detached."""
        data = self._keys + data
        if _DETACH in data:
            raise Detached
        self._keys = data[-1:] if data.endswith(_DETACH[:1]) else b""
        return data[: len(data) - len(self._keys)]

    def _take_signals(self) -> None:
        for number in os.read(self._wakeup, 512):
            if number == signal.SIGWINCH:
                if self._terminal:
                    self._send_window()
            elif number == signal.SIGHUP and self._terminal:
                # It says that of our terminal; the container's goes on, as when one leaves it.
                raise HungUp
            elif self._forward is not None:
                self._forward(number)

    def _send_window(self) -> None:
        for fd in (1, 0, 2):
            if os.isatty(fd):
                size = os.get_terminal_size(fd)
                self.send(frames.frame(frames.WINDOW, frames.WINDOW_SIZE.pack(size.lines, size.columns)))
                return

    def send(self, data: bytes) -> None:
        self._unsent += data
        self._flush()

    def _flush(self) -> None:
        """Send what the monitor takes; while it does not take all, nothing more is read from standard input."""
        try:
            while self._unsent:
                sent = self._connection.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            # It reads on when the container does.
            self._selector.modify(self._connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
        except (BrokenPipeError, ConnectionResetError):
            # The container has ended, perhaps before a word was said; its monitor's last words are still to be read.
            self._unsent.clear()
        if not self._unsent:
            self._selector.modify(self._connection, selectors.EVENT_READ)
        self._watch_stdin()

    def _watch_stdin(self) -> None:
        if self._stdin is None:
            return
        watched = self._stdin in self._selector.get_map()
        if self._unsent and watched:
            self._selector.unregister(self._stdin)
        elif not self._unsent and not watched:
            self._selector.register(self._stdin, selectors.EVENT_READ)


def _write(fd: int, data: bytes) -> None:
    """Raises OutputClosed, and HungUp where it was a terminal."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            # Whoever shares the descriptor has made it non-blocking.
            select.select([], [fd], [])
        except BrokenPipeError:
            raise OutputClosed from None
        except OSError as error:
            if error.errno != errno.EIO or not _is_character_device(fd):
                raise
            raise HungUp from None


def _is_character_device(fd: int) -> bool:
    return stat.S_ISCHR(os.fstat(fd).st_mode)
