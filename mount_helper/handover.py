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
# What a probe ends with beside 0 and error numbers, which are below 127: of the mount, with this bit.
_GONE = 254
_BELOW = 253
_BROKEN = 255
_NOT_ATTACHED = 128
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
            descriptor, root = _mount(request)
        except HelperError as error:
            _tell(daemon, FAILED + os.fsencode(str(error)))
            raise
        aside = root is not None
        device = None
        probe = 0
        # Held until it has answered, so that nobody who saw the root answer unmounts it before that is seen here.
        try:
            try:
                if root is None:
                    device = kernel.topmost(request.mountpoint)
                    if device is None:
                        raise HelperError(f"{show(request.mountpoint)} was unmounted at once by someone else")
                    root = os.open(request.mountpoint, os.O_PATH | os.O_CLOEXEC)
                else:
                    device = kernel.device_of(root)
                send_descriptor(daemon, MOUNTED + device, descriptor)
            finally:
                # From here on the connection lives as long as the daemon.
                os.close(descriptor)
            probe, answer = _probe(root, device, daemon, request if aside else None)
            try:
                speaker = _wait_for(daemon, (answer,), seconds)
            finally:
                os.close(answer)
            # A daemon that serves says nothing; one that has ended makes the probe end too.
            if speaker == daemon.fileno():
                raise HelperError(_last_word(daemon))
            number = os.waitstatus_to_exitcode(os.waitpid(probe, 0)[1])
            probe = 0
            if number not in (0, _BELOW):
                raise HelperError(_last_word(daemon) or _meaning(number, request))
            _heed_signals()
            os.close(root)
            root = None
            daemon.send(ANSWERED + (request.root_name if number == _BELOW else b""))
        except (HelperError, OSError) as error:
            failure = error if isinstance(error, HelperError) else HelperError(f"the daemon ended: {error.strerror}")
            _tell(daemon, FAILED + os.fsencode(str(failure)))
            if device is not None or not aside:
                unmount(request.mountpoint, device, lazy=True, force=True)
            _end(daemon, daemon_pid, probe)
            if device is not None and aside:
                # The probe may have attached it just then.
                unmount(request.mountpoint, device, lazy=True)
            raise failure from error
        finally:
            if root is not None:
                os.close(root)
    return device


def _mount(request: Request) -> tuple[int, int | None]:
    """The descriptor of the connection, and the root of its mount where that is still to be attached."""
    if request.root_name and not kernel.is_confined():
        try:
            return _mount_aside(request)
        except OSError:
            # mount(2) does it, or says why it can't be done
            pass
    return _mount_in_place(request), None


def _mount_aside(request: Request) -> tuple[int, int]:
    descriptor = kernel.open_device()
    try:
        # That there is no such directory is to be known before the daemon has its connection.
        os.close(os.open(request.mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        return descriptor, kernel.mount_aside(request, descriptor)
    except OSError:
        os.close(descriptor)
        raise


def _mount_in_place(request: Request) -> int:
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


def _probe(root: int, device: bytes, daemon: socket.socket, aside: Request | None) -> tuple[int, int]:
    """A child that asks for the attributes of the root, and a pipe that reads its end when the child ends.

    It attaches what was mounted `aside`, if that is given, and exits with 0, or _BELOW where it is not the root that is
    attached; with the error's number, or _GONE where the answer is not that of the mount with this `major:minor`. What
    it asks for can't be taken back once the daemon has it, so that it must not be asked for by this process.
    """
    reader, writer = os.pipe()
    helper = os.getpid()
    pid = os.fork()
    if pid == 0:
        number = _BROKEN
        try:
            # So that the daemon hears of it when the helper is killed.
            daemon.close()
            answered = os.stat(root).st_dev
            number = 0 if device == b"%d:%d" % (os.major(answered), os.minor(answered)) else _GONE
            if number == 0 and aside is not None:
                number = _attach(root, aside)
                if os.getppid() != helper:
                    # It was killed, and what the daemon did on that may have come too early.
                    unmount(aside.mountpoint, device, lazy=True)
        except OSError as error:
            number = error.errno or number
        finally:
            os._exit(number)
    os.close(writer)
    return pid, reader


def _attach(root: int, request: Request) -> int:
    try:
        return _BELOW if kernel.attach(root, request.root_name, request.mountpoint) else 0
    except OSError as error:
        return _NOT_ATTACHED | (error.errno or 0)


def _meaning(number: int, request: Request) -> str:
    """What it means that a probe has ended with this number."""
    if number == _GONE:
        return _ENDED
    if number < 0 or number == _BROKEN:
        return f"what asked for the root of {show(request.mountpoint)} ended before it had an answer"
    if number & _NOT_ATTACHED:
        error = OSError(number & ~_NOT_ATTACHED, os.strerror(number & ~_NOT_ATTACHED))
        return str(kernel.explain(error, request.mountpoint))
    return f"the root of {show(request.mountpoint)} does not answer: {os.strerror(number)}"


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
