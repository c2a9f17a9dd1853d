"""Mounting for a daemon that is ready to serve: the helper's side."""

from __future__ import annotations

import errno
import os
import select
import time

from mount_helper import fusermount, kernel
from mount_helper.lean import send_descriptor, signal, socket
from mount_helper.request import HelperError, Request, show
from mount_helper.unmounting import unmount

READY = b"R"
MOUNTED = b"M"
ANSWERED = b"A"
FAILED = b"F"
MAX_WORD = 65536  # bytes

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a caller may hold back, so that none of them arrives between success and its own end."""

_ENDED = "the daemon ended before the root answered; see its log"
_GONE = 254  # no error number
_TICK = 0.1  # seconds between looks for a signal
_PATIENCE = 5.0  # seconds for a daemon that was told to end
_LAST_WORD = 1.0  # seconds for one that fails to say why


def hear(daemon: socket.socket) -> bytes:
    """The daemon's next word, empty if it has ended. Raises HelperError when a signal asks to stop meanwhile."""
    _wait_for(daemon, ())
    return daemon.recv(MAX_WORD)


def hand_over(request: Request, daemon: socket.socket, daemon_pid: int, *, seconds: float) -> bytes:
    """Mount, send the descriptor to the daemon, and wait at most `seconds` until the root answers.

    The daemon must have said READY. Returns the `major:minor` of the mount. Raises HelperError when any of it fails or
    a signal asks to stop; then the daemon has been told, has ended, and nothing is mounted.
    """
    with _SignalsHeld():
        try:
            descriptor = _mount(request)
        except HelperError as error:
            _tell(daemon, FAILED + os.fsencode(str(error)))
            raise
        device = None
        probe = 0
        # Held until it has answered, so that nobody who saw the root answer unmounts it before that is seen here.
        root = None
        try:
            try:
                device = kernel.topmost(request.mountpoint)
                if device is None:
                    raise HelperError(f"{show(request.mountpoint)} was unmounted at once by someone else")
                root = os.open(request.mountpoint, os.O_PATH | os.O_CLOEXEC)
                send_descriptor(daemon, MOUNTED + device, descriptor)
            finally:
                # From here on the connection lives as long as the daemon.
                os.close(descriptor)
            probe, answer = _probe(root, device, daemon)
            try:
                speaker = _wait_for(daemon, (answer,), seconds)
            finally:
                os.close(answer)
            # A daemon that serves says nothing; one that has ended makes the probe end too.
            if speaker == daemon.fileno():
                raise HelperError(_last_word(daemon))
            number = os.waitstatus_to_exitcode(os.waitpid(probe, 0)[1])
            probe = 0
            if number != 0:
                silent = f"the root of {show(request.mountpoint)} does not answer: {os.strerror(number)}"
                raise HelperError(_last_word(daemon) or (_ENDED if number == _GONE else silent))
            _heed_signals()
            os.close(root)
            root = None
            daemon.send(ANSWERED)
        except (HelperError, OSError) as error:
            failure = error if isinstance(error, HelperError) else HelperError(f"the daemon ended: {error.strerror}")
            _tell(daemon, FAILED + os.fsencode(str(failure)))
            unmount(request.mountpoint, device, lazy=True, force=True)
            _end(daemon, daemon_pid, probe)
            raise failure from error
        finally:
            if root is not None:
                os.close(root)
    return device


def _mount(request: Request) -> int:
    try:
        descriptor = kernel.open_device()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
            return fusermount.mount(request)
        raise kernel.explain(error, request.mountpoint) from error
    try:
        kernel.mount(request, descriptor)
    except OSError as error:
        os.close(descriptor)
        if error.errno == errno.EPERM:
            return fusermount.mount(request)
        raise kernel.explain(error, request.mountpoint) from error
    return descriptor


def _probe(root: int, device: bytes, daemon: socket.socket) -> tuple[int, int]:
    """A child that asks for the attributes of the root, and a pipe that reads its end when the child ends.

    It exits with 0, the error's number, or _GONE where the answer is not that of the mount with this `major:minor`.
    The request cannot be taken back once the daemon has it, so that it must not be made by this process.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        number = 255
        try:
            # So that the daemon hears of it when the helper is killed.
            daemon.close()
            answered = os.stat(root).st_dev
            number = 0 if device == b"%d:%d" % (os.major(answered), os.minor(answered)) else _GONE
        except OSError as error:
            number = error.errno or number
        finally:
            os._exit(number)
    os.close(writer)
    return pid, reader


def _wait_for(daemon: socket.socket, others: tuple[int, ...], seconds: float = float("inf")) -> int:
    """The descriptor that can be read first, the daemon's before others. Raises HelperError on a signal or too late."""
    poller = select.poll()
    for descriptor in (daemon.fileno(), *others):
        poller.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        _heed_signals()
        speakers = {descriptor for descriptor, _ in poller.poll(_TICK * 1000)}
        for descriptor in (daemon.fileno(), *others):
            if descriptor in speakers:
                return descriptor
    raise HelperError(f"the root did not answer within {seconds:g} seconds")


def _last_word(daemon: socket.socket) -> str:
    """Why a daemon whose mount has just failed says that it did, or that it ended; empty where it does neither."""
    poller = select.poll()
    poller.register(daemon, select.POLLIN)
    if not poller.poll(_LAST_WORD * 1000):
        return ""
    return os.fsdecode(daemon.recv(MAX_WORD).removeprefix(FAILED)).partition(" ")[2] or _ENDED


def _heed_signals() -> None:
    if signal.sigpending() & set(STOP_SIGNALS):
        raise HelperError("interrupted by a signal")


def _end(daemon: socket.socket, daemon_pid: int, probe: int) -> None:
    """See to it that the daemon ends, and with it whatever waits for it."""
    poller = select.poll()
    poller.register(daemon, 0)
    if not poller.poll(_PATIENCE * 1000):
        os.kill(daemon_pid, signal.SIGKILL)
    if probe:
        os.waitpid(probe, 0)


def _tell(daemon: socket.socket, word: bytes) -> None:
    try:
        daemon.send(word)
    except (BrokenPipeError, ConnectionResetError):
        # A daemon that has ended need not be told.
        return


class _SignalsHeld:
    """Between mount and success a signal must not end this process, or a dead mount would stay behind."""

    __slots__ = ("before",)

    def __enter__(self) -> None:
        self.before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self.before)
