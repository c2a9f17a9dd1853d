"""Mounting: one process becomes the daemon, which opens the layers and serves; another is its helper.

The helper does what takes privilege and waits until the root answers (see mount_helper). In the background the caller
is the helper and its child the daemon; in the foreground it is the other way round, so that the daemon is the process
that the user started.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import syslog
import time
from _thread import start_new_thread

import mount_helper
from mount_helper.lean import receive_descriptor, signal, socket
from overlayfs_py import journal
from overlayfs_py.config import MountConfig, check_paths
from overlayfs_py.engines.beginning import Beginning
from overlayfs_py.engines.once import Once
from overlayfs_py.errors import ConfigError, LayerError, MountError, OverlayError
from overlayfs_py.journal import Journal
from overlayfs_py.records import TYPE_CHECKING, NamedTuple
from overlayfs_py.sys.descriptors import close_all_but, make_room

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from overlayfs_py.core.overlay import Overlay

ANSWER_LIMIT = 30.0
"""Seconds in which the root must answer once it is mounted."""

GRACE = 10.0
"""Seconds that those who still use the mount have after a signal to end it."""

READ_AHEAD = 512
"""KiB that the kernel reads ahead in a file that is read in sequence, which a pipe takes at once (ADR 18)."""

_MS_POSIXACL = 1 << 16
_SIGNAL_NAMES: dict[int, str] = {signal.SIGINT: "SIGINT", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
_ERRORS: dict[str, type[OverlayError]] = {kind.__name__: kind for kind in (ConfigError, LayerError, MountError)}

log = Journal(__name__)


class Mount(NamedTuple):
    """A live mount and the daemon that serves it, a child of this process."""

    mountpoint: bytes
    device: bytes
    """`major:minor`, as in proc_pid_mountinfo(5)."""
    pid: int

    def unmount(self) -> None:
        """Unmount, and wait until the daemon is gone; raises MountError, and changes nothing, while it is in use."""
        try:
            mount_helper.unmount(self.mountpoint, self.device)
        except mount_helper.HelperError as error:
            raise MountError(str(error)) from error
        os.waitpid(self.pid, 0)


def mount(config: MountConfig) -> Mount:
    """Mount, served by a daemon in the background; returns once the root answers.

    Call it before starting threads, since the daemon is a fork of this process. The daemon logs to the file named by
    OVERLAYFS_PY_LOG, else to syslog. Raises OverlayError; then nothing is mounted and no process is left.
    """
    config = check_paths(config)
    log_file = os.environ.get("OVERLAYFS_PY_LOG")
    if log_file:
        log_file = os.path.abspath(log_file)
    helper_end, daemon_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    daemon_pid = os.fork()
    if daemon_pid == 0:
        _become_daemon(config, daemon_end, log_file)
    daemon_end.close()
    try:
        device = _help(config, helper_end, daemon_pid)
    except BaseException:
        helper_end.close()
        os.waitpid(daemon_pid, 0)
        raise
    helper_end.close()
    return Mount(config.mountpoint, device, daemon_pid)


def serve_in_foreground(config: MountConfig, *, debug: bool = False) -> None:
    """Mount, and serve from this process until unmounted or told to stop by SIGINT, SIGTERM or SIGHUP.

    For a process that does nothing else: its descriptors are closed, and it logs to standard error. Raises OverlayError
    before anything is mounted. The process ends by itself, with status 1, when the mount fails later, and with 0 when
    it is still in use after a signal and GRACE.
    """
    config = check_paths(config)
    helper_end, daemon_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    daemon_pid = os.getpid()
    helper_pid = os.fork()
    if helper_pid == 0:
        _become_helper(config, helper_end, daemon_end, daemon_pid)
    helper_end.close()
    close_all_but({daemon_end.fileno()})
    journal.say_to(journal.lines_to(2), journal.DEBUG if debug else journal.INFO)
    try:
        _serve(config, daemon_end, helper_pid)
    except OverlayError:
        daemon_end.close()
        os.waitpid(helper_pid, 0)
        raise


def _become_helper(config: MountConfig, daemon: socket.socket, theirs: socket.socket, daemon_pid: int) -> NoReturn:
    status = 1
    try:
        theirs.close()
        _help(config, daemon, daemon_pid)
        status = 0
    except OverlayError:
        # The daemon has been told and says it.
        status = 1
    finally:
        os._exit(status)


def _help(config: MountConfig, daemon: socket.socket, daemon_pid: int) -> bytes:
    """Wait until the daemon has its layers open, then mount for it. Raises the daemon's error, or MountError."""
    try:
        word = mount_helper.hear(daemon)
    except mount_helper.HelperError as error:
        raise MountError(str(error)) from error
    if not word.startswith(mount_helper.READY):
        kind, _, message = os.fsdecode(word.removeprefix(mount_helper.FAILED)).partition(" ")
        raise _ERRORS.get(kind, MountError)(message or "the daemon ended before it was ready; see its log")
    flags = config.mount_flags
    if not config.noacl:
        # This leaves the umask to the filesystem, since a default ACL takes its place; fuse_fill_super_common.
        flags |= _MS_POSIXACL
    request = mount_helper.Request(
        mountpoint=config.mountpoint,
        source=os.fsencode(config.fsname),
        flags=flags,
        allow_other=config.allow_other or config.allow_root,
        default_permissions=config.default_permissions,
        context=os.fsencode(config.context) if config.context is not None and _has_selinux() else None,
        root_name=word.removeprefix(mount_helper.READY),
    )
    try:
        return mount_helper.hand_over(request, daemon, daemon_pid, seconds=ANSWER_LIMIT)
    except mount_helper.HelperError as error:
        raise MountError(str(error)) from error


def _become_daemon(config: MountConfig, helper: socket.socket, log_file: str | None) -> NoReturn:
    status = 1
    try:
        _detach(helper.fileno())
        journal.say_to(_log_file(log_file) if log_file else _system_log(), journal.INFO)
        _serve(config, helper, None)
        status = 0
    except OverlayError as error:
        _tell(helper, error)
    except Exception:
        log.exception("unexpected error; the daemon ends")
    finally:
        os._exit(status)


def _tell(helper: socket.socket, error: OverlayError) -> None:
    try:
        helper.send(mount_helper.FAILED + os.fsencode(f"{type(error).__name__} {error}"))
    except (BrokenPipeError, ConnectionResetError):
        # A helper that has ended need not be told.
        return


def _detach(kept: int) -> None:
    """Leave the caller's session, directory, signal handlers, and descriptors except the one to keep."""
    # These descriptors are no longer what objects of the caller may still close when they are collected.
    gc.freeze()
    for number in (*mount_helper.STOP_SIGNALS, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, mount_helper.STOP_SIGNALS)
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    close_all_but({kept})


def _serve(config: MountConfig, helper: socket.socket, helper_pid: int | None) -> None:
    """Open the layers, have them mounted, and serve until unmounted. Raises OverlayError before that."""
    os.umask(0)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _warn(config)
    engine = _load(config)
    make_room(helper.fileno(), hard)
    overlay = engine.open_overlay(config)
    try:
        # From here on these wait for the watcher.
        signal.pthread_sigmask(signal.SIG_BLOCK, mount_helper.STOP_SIGNALS)
        beginning = Beginning(engine.root_name(config))
        connection, device = _ask_for_connection(helper, config.mountpoint, beginning.name)
        answered = Once()
        start_new_thread(_watch, (config.mountpoint, device, helper, helper_pid, answered, beginning))
        try:
            engine.serve(overlay, connection, beginning)
        except BaseException as error:
            # A mount that nobody serves would answer every call with ENOTCONN.
            mount_helper.unmount(config.mountpoint, device, lazy=True)
            if isinstance(error, OverlayError) and not answered.has_happened():
                _tell(helper, error)
                # The helper repeats it, on which the watcher ends this process.
                answered.wait()
            raise
        # Unmounted before the helper was content: the watcher ends this process.
        answered.wait()
    finally:
        overlay.close()


class _Engine(NamedTuple):
    open_overlay: Callable[[MountConfig], Overlay]
    root_name: Callable[[MountConfig], bytes]
    serve: Callable[[Overlay, int, Beginning], None]


def _load(config: MountConfig) -> _Engine:
    """The core and the engine, loaded by the daemon alone, since they take longer than all the rest."""
    engine = _choose_engine(config)
    try:
        from overlayfs_py.core.overlay import Overlay

        if engine == "native":
            from overlayfs_py.engines import native

            native.check(config)
            return _Engine(Overlay.open, native.root_name, native.serve)
        from overlayfs_py.engines import portable
    except ImportError as error:
        raise MountError(f"the {engine} engine cannot be loaded: {error}") from error
    for option, given in (
        ("max_write", config.max_write is not None),
        ("request_timeout", config.request_timeout > 0),
        ("max_nodes", config.max_nodes > 0),
        ("security_label", config.security_label),
        ("readdirplus", config.readdirplus != "on"),
        ("cpu_latency", config.cpu_latency == "on"),
    ):
        if given:
            log.warning("option %s has no effect in the portable engine; ignored", option)
    journal.take_logging_over()
    return _Engine(Overlay.open, portable.root_name, portable.serve)


def _choose_engine(config: MountConfig) -> str:
    """The engine that serves a mount; raises MountError where it can't be the one that the options ask for."""
    if config.engine == "portable":
        return "portable"
    from overlayfs_py.engines import machine

    obstacle = machine.obstacle_to_native()
    if obstacle is None:
        return "native"
    if config.engine == "native":
        raise MountError(f"the native engine can't be used here: {obstacle}; use engine=auto")
    for option, asked, otherwise in (
        ("uring=on", config.uring == "on", "uring=auto"),
        ("io=passthrough", config.io == "passthrough", "io=cached"),
        ("nfs_export=on", config.nfs_export, "nfs_export=off"),
    ):
        if asked:
            raise MountError(f"{option} takes the native engine, which can't be used here: {obstacle}; use {otherwise}")
    log.info("the portable engine serves, as the native one can't: %s", obstacle)
    return "portable"


def _warn(config: MountConfig) -> None:
    for option in config.unknown:
        log.warning("option %s has no effect here; ignored", option)
    if config.context is not None and not _has_selinux():
        log.warning("option context has no effect without SELinux; ignored")


def _ask_for_connection(helper: socket.socket, mountpoint: bytes, root_name: bytes) -> tuple[int, bytes]:
    """Say that the layers are open; returns the FUSE connection and the `major:minor` of its mount."""
    try:
        helper.send(mount_helper.READY + root_name)
        word, descriptor = receive_descriptor(helper, mount_helper.MAX_WORD)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise MountError("the mount helper ended") from error
    if not word.startswith(mount_helper.MOUNTED) or descriptor is None:
        if not word:
            mount_helper.unmount_if_dead(mountpoint)
        raise MountError(os.fsdecode(word.removeprefix(mount_helper.FAILED)) or "the mount helper ended")
    return descriptor, word.removeprefix(mount_helper.MOUNTED)


def _watch(
    mountpoint: bytes,
    device: bytes,
    helper: socket.socket,
    helper_pid: int | None,
    answered: Once,
    beginning: Beginning,
) -> None:
    """Wait for the helper's verdict, then for a signal to stop; a thread of the daemon."""
    word = helper.recv(mount_helper.MAX_WORD)
    helper.close()
    if helper_pid is not None:
        os.waitpid(helper_pid, 0)
    if not word.startswith(mount_helper.ANSWERED):
        log.error("%s", os.fsdecode(word.removeprefix(mount_helper.FAILED)) or "the mount helper was killed")
        _unmount_lazily(mountpoint, device)
        os._exit(1)
    beginning.settle(word.removeprefix(mount_helper.ANSWERED))
    answered.happen()
    _read_ahead(device)
    number = signal.sigwait(mount_helper.STOP_SIGNALS)
    log.info("unmounting on %s", _SIGNAL_NAMES[number])
    _unmount_lazily(mountpoint, device)
    signal.sigtimedwait(mount_helper.STOP_SIGNALS, GRACE)
    log.warning("%s was still in use; those who use it get errors now", os.fsdecode(mountpoint))
    os._exit(0)


def _read_ahead(device: bytes) -> None:
    """Have the kernel read ahead more; by itself it stays at an eighth of what one request may carry.

    It is root's to say, of the machine, which may have made /sys read-only; without it reading takes more requests.
    """
    try:
        with open(b"/sys/class/bdi/%s/read_ahead_kb" % device, "r+b", buffering=0) as setting:
            setting.write(b"%d" % READ_AHEAD)
    except OSError as error:
        # ENOENT: no sysfs, or unmounted already; ENODEV: unmounted just now
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENODEV):
            raise


def _unmount_lazily(mountpoint: bytes, device: bytes) -> None:
    try:
        mount_helper.unmount(mountpoint, device, lazy=True)
    except mount_helper.HelperError as error:
        log.error("%s", error)


def _has_selinux() -> bool:
    """Whether the kernel labels files; mount(8) too drops the option where it does not."""
    return os.path.exists("/sys/fs/selinux/enforce")


def _system_log() -> Callable[[int, str], None]:
    """What writes to syslog(3), which says nothing where no logger runs."""
    # It tells the time of day, and the zone's file may lie where a mount is to be served.
    time.tzset()
    syslog.openlog("overlayfs-py", syslog.LOG_PID, syslog.LOG_DAEMON)

    def write(level: int, text: str) -> None:
        priority = (
            syslog.LOG_ERR
            if level >= journal.ERROR
            else syslog.LOG_WARNING
            if level >= journal.WARNING
            else syslog.LOG_INFO
        )
        for line in text.splitlines():
            syslog.syslog(priority, line.encode(errors="backslashreplace").decode())

    return write


def _log_file(path: str) -> Callable[[int, str], None]:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise MountError(f"cannot open the log file {path}: {error.strerror}") from error
    return journal.records_to(descriptor)
