"""The monitor: one small process beside each running container, without which nothing of it stays.

It mounts the root, has the OCI runtime start the container, is the parent of the container's process, passes on its
streams and signals, and when it ends takes everything down and writes what became of it. Whoever finds it killed
does the rest (see lifecycle.settle): the file `alive` is locked until the monitor and an OCI runtime at work are gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import json
import os
import signal
import socket
import time
from typing import NoReturn

from overlayfs_py.runtime import bundle, oci, root, users, volumes
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.limits import cgroup_of, ran_out_of_memory
from overlayfs_py.runtime.process import Process
from overlayfs_py.runtime.signals import FORWARDED
from overlayfs_py.runtime.state import Container, Containers
from overlayfs_py.runtime.streams import Streams
from overlayfs_py.runtime.userns import is_rootless
from overlayfs_py.sys import namespaces
from overlayfs_py.sys.descriptors import close_all_but


def launch(containers: Containers, container: Container, client: socket.socket | None) -> None:
    """Start the container under a monitor of its own; `client` is the monitor's end of the first client's connection.

    The caller holds the container's lock, has no other threads, and closes `client`. Returns once the container runs.
    Raises ContainerError; then it does not run.
    """
    report, reporter = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.fork() == 0:
                _become_monitor(containers, container, client, reporter)
        finally:
            os._exit(0)
    os.close(reporter)
    os.waitpid(child, 0)
    with open(report, "rb") as pipe:
        words = pipe.read()
    if not words:
        raise ContainerError("the monitor of the container was killed")
    answer = json.loads(words)
    if answer:
        raise ContainerError(answer["error"], answer["status"])


def _become_monitor(
    containers: Containers, container: Container, client: socket.socket | None, reporter: int
) -> NoReturn:
    status = 1
    try:
        # These descriptors are no longer what objects of the caller may still close when they are collected.
        gc.freeze()
        _detach({reporter} if client is None else {reporter, client.fileno()})
        monitor = _Monitor(containers, container)
        try:
            monitor.start(client)
        except ContainerError as error:
            os.write(reporter, json.dumps({"error": str(error), "status": error.status}).encode())
        else:
            os.write(reporter, b"{}")
            os.close(reporter)
            monitor.run()
        status = 0
    finally:
        os._exit(status)


def _detach(kept: set[int]) -> None:
    os.setsid()
    os.chdir("/")
    os.umask(0o022)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    close_all_but(kept)
    namespaces.become_subreaper()
    namespaces.set_name(b"ovl-monitor")


class _Monitor:
    """What is up for a container, and how to take it down."""

    __slots__ = (
        "_containers",
        "_undo",
        "alive",
        "code",
        "container",
        "failure",
        "pid",
        "reaped",
        "rootless",
        "status",
        "streams",
        "wakeup",
    )

    def __init__(self, containers: Containers, container: Container) -> None:
        self._containers = containers
        self._undo = contextlib.ExitStack()
        self.container = container
        self.alive = os.open(container.directory / "alive", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.alive, fcntl.LOCK_EX)
        self.pid = 0
        self.reaped: set[int] = set()
        """The children that are gone; their pids may be somebody else's."""
        self.code: int | None = None
        self.failure = ""
        """Why the container was ended by this process."""
        self.rootless = is_rootless()
        self.status = container.status()
        self.streams = Streams(container.directory / "log", stdin_once=container.spec.stdin_once)
        self.wakeup, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (*FORWARDED, signal.SIGCHLD):
            signal.signal(number, lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def start(self, client: socket.socket | None) -> None:
        """Bring everything up. Raises ContainerError; then nothing is left of it."""
        before = self.status
        try:
            self._write(
                phase="starting",
                monitor=Process.of(os.getpid()),
                process=None,
                error="",
                exit_code=None,
                ports=(),
                daemon=None,
                address=None,
                address6=None,
                out_of_memory=False,
            )
            if client is not None:
                # It misses nothing, even if its first words are read late.
                self.streams.add_client(client, wants_output=True)
            self._bring_up()
        except (ContainerError, OSError) as error:
            failure = error if isinstance(error, ContainerError) else ContainerError(_told(error))
            self.streams.close()
            left = self._take_down()
            failed = dataclasses.replace(before, monitor=None, exit_code=failure.status, error=left or str(failure))
            # On a full disk it stays as it is, and whoever looks next sets it right.
            with contextlib.suppress(OSError):
                self.container.write_status(failed)
            raise failure from error

    def _bring_up(self) -> None:
        container, spec = self.container, self.container.spec
        os.environ.setdefault("OVERLAYFS_PY_LOG", str(container.directory / "mount.log"))
        mounted = root.mount_root(container)
        self._undo.callback(self._unmount)
        self._write(daemon=Process.of(mounted.pid))
        path, address = self._set_up_network()
        root_fd = os.open(container.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            around = bundle.Surroundings(
                user=users.resolve(root_fd, spec.user, spec.groups),
                volumes=volumes.mounts(self._containers, spec.volumes, root_fd),
                network_namespace=path,
                addresses=tuple(filter(None, (address, self.status.address6))),
                rootless=self.rootless,
                cgroup=None if self.rootless else cgroup_of(container),
            )
        finally:
            os.close(root_fd)
        bundle.write(container, around)
        self._undo.callback(oci.delete, container)
        self._run()
        self._write(phase="running", process=Process.of(self.pid), started=time.time(), finished=None)
        self.streams.listen(container.directory)

    def _set_up_network(self) -> tuple[str | None, str | None]:
        spec = self.container.spec
        if spec.network.startswith("container:"):
            return self._join_network(spec.network.removeprefix("container:")), None
        if spec.network != "private":
            return (None if spec.network == "host" else ""), None
        # Loaded only here, as a container without a network of its own starts sooner.
        from overlayfs_py.runtime import network, pasta, publishing

        if self.rootless:
            net, ports, pid = pasta.start(self.container.directory, spec.ports)
            self._undo.callback(self._end_child, pid)
        else:
            sockets = publishing.bind(spec.ports)
            ports = tuple(port for _, port in sockets)
            self._undo.callback(network.remove, self.container)
            net = network.create(self.container)
            if sockets:
                self._undo.callback(self._end_child, publishing.start(sockets, net.address or ""))
        # To be written with the rest once it runs.
        self.status = dataclasses.replace(self.status, address=net.address, address6=net.address6, ports=ports)
        return net.path, net.address

    def _join_network(self, word: str) -> str:
        """The network namespace of another container that runs, kept open here. Raises ContainerError."""
        process = self._containers.find(word).status().process
        try:
            if process is None or not process.alive():
                raise FileNotFoundError
            fd = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            raise ContainerError(f"the container {word[:12]}, whose network this one has, is not running") from None
        return f"/proc/{os.getpid()}/fd/{fd}"

    def _run(self) -> None:
        """Start the container's process, with its streams connected."""
        if self.container.spec.terminal:
            self._run_in_terminal()
            return
        closed: list[int] = []
        stdin, feed = os.pipe2(os.O_CLOEXEC) if self.container.spec.interactive else (_null(), None)
        output, stdout = os.pipe2(os.O_CLOEXEC)
        errors, stderr = os.pipe2(os.O_CLOEXEC)
        closed += (stdin, stdout, stderr)
        try:
            self.pid = oci.run(self.container, stdio=(stdin, stdout, stderr), console=None, kept=(self.alive,))
        finally:
            for fd in closed:
                os.close(fd)
        self.streams.connect(stdin=feed, stdout=output, stderr=errors)

    def _run_in_terminal(self) -> None:
        console = self.container.bundle / "console"
        console.unlink(missing_ok=True)
        bundle_fd = os.open(self.container.bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        null = _null()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(f"/proc/self/fd/{bundle_fd}/console")
                listener.listen(1)
                stdio = (null, null, null)
                self.pid = oci.run(self.container, stdio=stdio, console="console", kept=(self.alive,))
                connection, _ = listener.accept()
            with connection:
                terminal = socket.recv_fds(connection, 1024, 1)[1][0]
        finally:
            os.close(bundle_fd)
            os.close(null)
            console.unlink(missing_ok=True)
        os.set_inheritable(terminal, False)
        self.streams.connect(stdin=fcntl.fcntl(terminal, fcntl.F_DUPFD_CLOEXEC, 3), stdout=terminal, stderr=None)

    def run(self) -> None:
        """Serve until the container's process ends; then take everything down."""
        self.streams.watch(self.wakeup, self._take_signals)
        self._reap()
        while self.code is None:
            self.streams.turn(None)
        self.streams.drain()
        out_of_memory = ran_out_of_memory(self.container)
        error = self._take_down() or self.failure
        if self.streams.lost:
            error = f"a part of the log is lost: {self.streams.lost}"
        if self.container.spec.remove:
            self._remove()
        else:
            # Whoever comes now looks at what is written next.
            self.streams.stop_listening()
            self.status = self.status.ended(self.code, error, out_of_memory=out_of_memory)
            self.container.write_status(self.status)
        os.close(self.alive)
        self.streams.end(self.code)

    def _take_down(self) -> str:
        """Undo what start did; returns what went wrong with that."""
        try:
            self._undo.close()
        except ContainerError as error:
            return str(error)
        return ""

    def _remove(self) -> None:
        # Somebody else has removed it, or what is left is swept away later.
        with contextlib.suppress(ContainerError), self.container.locked():
            self._containers.discard(self.container)
        for volume in self.container.spec.volumes:
            if volume.anonymous and volume.name is not None:
                # In use by another container, which took it by name.
                with contextlib.suppress(ContainerError):
                    volumes.remove(self._containers, volume.name)

    def _unmount(self) -> None:
        root.unmount_root(self.container, self.status.daemon)

    def _end_child(self, pid: int) -> None:
        if pid not in self.reaped:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _take_signals(self, fd: int) -> None:
        for number in os.read(fd, 512):
            if number != signal.SIGCHLD and self.code is None:
                # It is not reaped yet, so the pid is still its own.
                os.kill(self.pid, number)
        self._reap()

    def _reap(self) -> None:
        """Collect every child that has ended, until the container's process has."""
        while self.code is None:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self.reaped.add(pid)
            if self.status.daemon is not None and pid == self.status.daemon.pid:
                # Its root answers no more, and what it writes is lost.
                self.failure = "the process that serves its root has ended"
                os.kill(self.pid, signal.SIGKILL)
            elif pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
                self.code = code if code >= 0 else 128 - code

    def _write(self, **changes: object) -> None:
        self.status = dataclasses.replace(self.status, **changes)  # type: ignore[arg-type]
        self.container.write_status(self.status)


def _null() -> int:
    return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


def _told(error: OSError) -> str:
    return f"{error.strerror}: {error.filename}" if error.filename else f"{error.strerror}"
