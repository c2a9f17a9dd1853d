"""What is done to containers: create, start, stop, kill, wait, rename, remove, and setting right what was killed."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import signal
import socket
import stat
import time
from collections.abc import Mapping, Sequence
from typing import Any

from overlayfs_py.images import Store
from overlayfs_py.runtime import bundle, client, devices, limits, monitor, names, oci, root, volumes
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.spec import Spec, Volume, merge_env, parse_ports, parse_signal, parse_target
from overlayfs_py.runtime.state import Container, Containers, Status, make_directory, remove_tree, removing
from overlayfs_py.runtime.userns import is_rootless

KILLED = 128 + signal.SIGKILL
LOST = "the monitor of the container was killed, and the container with it"
_GRACE = 10.0  # seconds that a process has to end when it is asked to
_PATIENCE = 30.0  # seconds for a process that was killed, and what watches it, to be gone


def complete(spec: Spec, config: Mapping[str, Any], *, entrypoint: Sequence[str] | None) -> Spec:
    """The spec with what the image's configuration says where the user says nothing.

    `entrypoint` replaces the image's, and with it its command. Raises ContainerError. Source: the OCI image
    specification, config.md, and docker-run(1).
    """
    inner = config.get("config") or {}
    first = entrypoint if entrypoint is not None else inner.get("Entrypoint") or ()
    rest = spec.args or (() if entrypoint is not None else inner.get("Cmd") or ())
    args = (*first, *rest)
    if not args:
        raise ContainerError("the image has no default command; give one")
    taken = {volume.target for volume in spec.volumes} | {target for target, _ in spec.tmpfs}
    declared = (parse_target(target, "the image's volume") for target in inner.get("Volumes") or ())
    added = (Volume(target, name=names.new_id(), anonymous=True) for target in declared if target not in taken)
    published = {(port.container, port.protocol) for port in spec.ports}
    exposed = (port for text in inner.get("ExposedPorts") or () if spec.publish_all for port in parse_ports(text))
    stop_signal = inner.get("StopSignal")
    return dataclasses.replace(
        spec,
        args=args,
        env=merge_env(inner.get("Env") or (), spec.env),
        cwd=spec.cwd or inner.get("WorkingDir") or "/",
        user=spec.user or inner.get("User") or "",
        volumes=(*spec.volumes, *added),
        ports=(*spec.ports, *(port for port in exposed if (port.container, port.protocol) not in published)),
        stop_signal=spec.stop_signal or (parse_signal(stop_signal) if stop_signal else signal.SIGTERM),
        labels=tuple({**(inner.get("Labels") or {}), **dict(spec.labels)}.items()),
    )


def create(
    containers: Containers,
    store: Store,
    reference: str,
    spec: Spec,
    *,
    name: str | None = None,
    entrypoint: Sequence[str] | None = None,
) -> Container:
    """Make a container of an image. Raises ContainerError or ImageError; then there is none."""
    if name is not None:
        names.check(name)
    limits.check(spec)
    bundle.capabilities(spec)
    devices.of(spec)
    if spec.init:
        bundle.find_init()
    oci.find()
    containers.sweep()
    with store.locked(exclusive=False):
        image = store.image(reference)
        new = names.new_id()
        made = Container(
            directory=containers.root / "containers.tmp" / new,
            id=new,
            name=name or "",
            image=image.id,
            image_name=reference,
            created=time.time(),
            lowers=(*(str(layer.path) for layer in reversed(image.layers)), str(root.skeleton(containers.root))),
            userxattr=store.userxattr,
            spec=complete(spec, image.config, entrypoint=entrypoint),
        )
        try:
            with containers.naming():
                return _add(containers, made)
        except BaseException:
            # Another command may sweep it away first.
            with contextlib.suppress(FileNotFoundError), removing(made.directory):
                remove_tree(made.directory)
            raise


def _add(containers: Containers, made: Container) -> Container:
    if made.name:
        containers.check_free(made.name)
    else:
        taken = {other.name for other in containers.all()}
        while (name := names.invent()) in taken:
            pass
        made = dataclasses.replace(made, name=name)
    for part in ("", "upper", "work", "root", "bundle"):
        make_directory(made.directory / part, 0o755 if part == "upper" else 0o700)
    # The root of an overlay has the mode and owner of its upper layer's.
    above = os.stat(made.lowers[0])
    os.chown(made.upper, above.st_uid, above.st_gid)
    os.chmod(made.upper, stat.S_IMODE(above.st_mode))
    for volume in made.spec.volumes:
        if volume.name is not None:
            volumes.ensure(containers, volume.name, anonymous=volume.anonymous)
    containers.add(made)
    return dataclasses.replace(made, directory=containers.root / "containers" / made.id)


def start(containers: Containers, container: Container, first: socket.socket | None = None) -> None:
    """Start a container that does not run; `first` is the monitor's end of its first client.

    Raises ContainerError.
    """
    with container.locked():
        if settle_locked(containers, container).is_up:
            raise ContainerError(f"container {container.name} runs already", 1)
        mounted = root.mounts_of(container)
        if mounted:
            raise ContainerError(f"container {container.name} is mounted on {mounted[0]}; unmount that first")
        monitor.launch(containers, container, first)


def settle(containers: Containers, container: Container) -> Status:
    """The status of a container, after setting it right where its monitor was killed. Raises ContainerError."""
    status = container.status()
    if not _orphaned(status):
        return status
    with container.locked():
        return settle_locked(containers, container)


def settle_locked(containers: Containers, container: Container) -> Status:
    """As `settle`, while the container's lock is held."""
    status = container.status()
    if not _orphaned(status):
        return status
    with open(container.directory / "alive", "ab") as alive:
        # What a monitor that was killed has set going may still be going.
        fcntl.flock(alive, fcntl.LOCK_EX)
        if status.process is not None:
            status.process.send(signal.SIGKILL)
            status.process.wait(_PATIENCE)
        oci.delete(container)
        if container.spec.network == "private" and not is_rootless():
            from overlayfs_py.runtime import network

            network.remove(container)
        root.unmount_root(container, status.daemon)
    settled = status.ended(KILLED, LOST, out_of_memory=status.out_of_memory)
    container.write_status(settled)
    if container.spec.remove:
        _discard(containers, container, with_volumes=True)
    return settled


def _orphaned(status: Status) -> bool:
    """Whether it should have a monitor and has none."""
    return status.is_up and (status.monitor is None or not status.monitor.alive())


def settle_lost(containers: Containers, container: Container) -> None:
    """Set a container right whose monitor let go of its clients without a word. Raises ContainerError."""
    watcher = container.status().monitor
    if watcher is not None:
        # Its connections end a moment before it does.
        watcher.wait(_PATIENCE)
    try:
        settle(containers, container)
    except ContainerError:
        # It was to be removed, and another command has seen to that.
        if container.directory.exists():
            raise


def settle_all(containers: Containers) -> list[tuple[Container, Status]]:
    """Every container with its status, the newest first, all of them set right."""
    found = []
    for container in containers.all():
        # Removed meanwhile.
        with contextlib.suppress(ContainerError):
            status = settle(containers, container)
            if container.directory.exists():
                found.append((container, status))
    return found


def running(containers: Containers, container: Container) -> Status:
    """The status of a container that runs. Raises ContainerError, with status 1, where it does not."""
    status = settle(containers, container)
    if status.phase == "starting":
        # Whoever starts it holds the lock until it runs.
        with container.locked():
            status = settle_locked(containers, container)
    if status.phase != "running":
        raise ContainerError(f"container {container.name} is not running", 1)
    return status


def kill(containers: Containers, container: Container, number: int) -> None:
    """Send the container's process a signal. Raises ContainerError."""
    process = running(containers, container).process
    assert process is not None
    if not process.send(number):
        raise ContainerError(f"container {container.name} is not running", 1)


def stop(containers: Containers, container: Container, seconds: float | None, number: int | None = None) -> None:
    """Ask the container's process to end, by its stop signal; kill it after so many seconds. Raises ContainerError.

    Without a number of seconds it is the container's own, or 10, as Docker's.
    Returns when all of it is down; at once for a container that does not run.
    """
    if not settle(containers, container).is_up:
        return
    try:
        status = running(containers, container)
    except ContainerError:
        if not container.directory.exists() or not container.status().is_up:
            # It ended by itself meanwhile.
            return
        raise
    assert status.process is not None and status.monitor is not None
    if seconds is None:
        seconds = _GRACE if container.spec.stop_timeout is None else container.spec.stop_timeout
    status.process.send(number or container.spec.stop_signal)
    if not status.process.wait(seconds):
        status.process.send(signal.SIGKILL)
    _await_monitor(containers, container, status)


def _await_monitor(containers: Containers, container: Container, status: Status) -> None:
    assert status.monitor is not None
    deadline = time.monotonic() + _PATIENCE
    while not _is_down(containers, container, status):
        # A monitor may still have clients to serve after all is down.
        status.monitor.wait(0.02)
        if time.monotonic() > deadline:
            raise ContainerError(f"container {container.name} did not stop within {_PATIENCE:.0f} s", 1)


def _is_down(containers: Containers, container: Container, status: Status) -> bool:
    if not container.directory.exists():
        return True
    now = container.status()
    return not now.is_up or now.monitor != status.monitor or _settles(containers, container)


def _settles(containers: Containers, container: Container) -> bool:
    try:
        return settle(containers, container).phase == "exited"
    except ContainerError:
        return not container.directory.exists()


def wait(containers: Containers, container: Container) -> int:
    """Wait until the container's process ends; returns its exit code, at once if it does not run.

    Raises ContainerError for one that removed itself before its exit code could be learnt.
    """
    connection = client.connect(container)
    if connection is not None:
        with connection:
            code = client.await_end(connection)
        if code is not None:
            return code
        settle_lost(containers, container)
    while (status := settle(containers, container)).is_up:
        if status.monitor is not None:
            status.monitor.wait(1)
    if container.directory.exists():
        return status.exit_code or 0
    if connection is not None:
        return KILLED
    raise ContainerError(f"no such container: {container.name}", 1)


def rename(containers: Containers, container: Container, name: str) -> None:
    """Raises ContainerError where the name is none, or taken."""
    names.check(name)
    with container.locked(), containers.naming():
        containers.check_free(name)
        dataclasses.replace(container, name=name).write()


def remove(containers: Containers, container: Container, *, force: bool, with_volumes: bool) -> None:
    """Remove a container with its own layer, and with its volumes that have no name; `force` kills it first.

    Raises ContainerError.
    """
    if settle(containers, container).is_up:
        if not force:
            raise ContainerError(f"container {container.name} is running; stop it first, or use -f", 1)
        stop(containers, container, 0, signal.SIGKILL)
    if not container.directory.exists():
        # It was one to be removed at its end.
        return
    with container.locked():
        if settle_locked(containers, container).is_up:
            raise ContainerError(f"container {container.name} was started meanwhile", 1)
        mounted = root.mounts_of(container)
        if mounted:
            raise ContainerError(f"container {container.name} is mounted on {mounted[0]}; unmount that first", 1)
        if container.directory.exists():
            _discard(containers, container, with_volumes=with_volumes)


def _discard(containers: Containers, container: Container, *, with_volumes: bool) -> None:
    containers.discard(container)
    for volume in container.spec.volumes:
        if with_volumes and volume.anonymous and volume.name is not None:
            # Another container has taken it by name, or somebody has removed it.
            with contextlib.suppress(ContainerError):
                volumes.remove(containers, volume.name)
