"""Containers on disk: `containers/ID/` holds all there is of one.

state.json    what it is: id, name, image, spec; written by whoever holds the container's lock
status.json   what became of it; written by its monitor, or under the lock once that is gone
upper, work   its layer
root          where it is mounted
bundle        what the OCI runtime reads
log           what it printed, JSON lines; mount.log and runtime.log are the mount's and the OCI runtime's own
lock          held by who starts or changes it
alive         held by its monitor and by the OCI runtime at work
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from overlayfs_py.runtime.errors import ContainerError, NoContainerError
from overlayfs_py.runtime.process import Process
from overlayfs_py.runtime.spec import Port, Spec

Phase = Literal["created", "starting", "running", "exited"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What became of a container. Times are seconds since the epoch."""

    phase: Phase = "created"
    monitor: Process | None = None
    process: Process | None = None
    """The container's PID 1, as the host sees it."""
    daemon: Process | None = None
    """What serves the mount at root."""
    address: str | None = None
    address6: str | None = None
    ports: tuple[Port, ...] = ()
    started: float | None = None
    finished: float | None = None
    exit_code: int | None = None
    out_of_memory: bool = False
    error: str = ""

    @property
    def is_up(self) -> bool:
        """Whether it should have a monitor."""
        return self.phase in ("starting", "running")

    def ended(self, exit_code: int | None, error: str, *, out_of_memory: bool = False) -> Status:
        """What is true from now on of a container whose first process is gone, and all that was up for it."""
        return dataclasses.replace(
            self,
            phase="exited",
            monitor=None,
            process=None,
            daemon=None,
            address=None,
            address6=None,
            ports=(),
            finished=time.time(),
            exit_code=exit_code,
            out_of_memory=out_of_memory,
            error=error,
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Status:
        fields = dict(data)
        for key in ("monitor", "process", "daemon"):
            fields[key] = None if data[key] is None else Process(**data[key])
        fields["ports"] = tuple(Port(**port) for port in data["ports"])
        return cls(**fields)


@dataclasses.dataclass(frozen=True, slots=True)
class Container:
    """A container as its directory tells it; `status` reads anew what changes."""

    directory: Path
    id: str
    name: str
    image: str
    """The image's ID."""
    image_name: str
    """What the user called the image."""
    created: float
    lowers: tuple[str, ...]
    """The directories of the image's layers, the topmost first."""
    userxattr: bool
    spec: Spec

    @property
    def short_id(self) -> str:
        return self.id[:12]

    @property
    def upper(self) -> Path:
        return self.directory / "upper"

    @property
    def root(self) -> Path:
        return self.directory / "root"

    @property
    def bundle(self) -> Path:
        return self.directory / "bundle"

    def status(self) -> Status:
        """As it was written last; whether the monitor still lives is another question."""
        path = self.directory / "status.json"
        try:
            return Status.from_json(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return Status()
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(path) from error

    def write_status(self, status: Status) -> None:
        # A crash of the machine ends what is up, so only the last word has to outlive one.
        write_json(self.directory / "status.json", dataclasses.asdict(status), durable=not status.is_up)

    def write(self) -> None:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        write_json(self.directory / "state.json", {**fields, "directory": None, "spec": self.spec.to_json()})

    @classmethod
    def read(cls, directory: Path) -> Container:
        """Raises FileNotFoundError where none is (any more)."""
        path = directory / "state.json"
        try:
            data = json.loads(path.read_bytes())
            data["directory"] = directory
            data["lowers"] = tuple(data["lowers"])
            data["spec"] = Spec.from_json(data["spec"])
            return cls(**data)
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(path) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from starting, changing or removing it. Raises ContainerError where it has been removed."""
        with lock(self.directory / "lock", what=self.name):
            yield


def _damaged(path: Path) -> ContainerError:
    return ContainerError(
        f"{path} is damaged or of another version; remove the directory it is in, if nothing runs there"
    )


def write_json(path: Path, data: object, *, durable: bool = True) -> None:
    """Replace a file in one step: after a crash it is the old one or the new one, never a part.

    If not `durable` it may be the old one although this has returned.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(data, file)
            file.flush()
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def make_directory(path: Path, mode: int) -> None:
    """Make a directory of this mode, whatever the umask, if it is not there."""
    try:
        path.mkdir()
    except FileExistsError:
        return
    path.chmod(mode)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def lock(path: Path, *, what: str, shared: bool = False) -> Iterator[None]:
    """Hold a lock file of this name until the block ends. Raises ContainerError where its directory is gone."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise ContainerError(f"no such container: {what}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink == 0 or not path.exists():
            raise ContainerError(f"no such container: {what}")
        yield
    finally:
        os.close(fd)


class Containers:
    """The containers and volumes below one root directory."""

    __slots__ = ("root",)

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("containers", "containers.tmp", "volumes"):
            # Containers hold set-user-ID programs that no other user is to run from outside.
            (root / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def all(self) -> list[Container]:
        """Every container, the newest first."""
        found = []
        for entry in os.scandir(self.root / "containers"):
            # One that is removed while we look is none.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found.append(Container.read(Path(entry.path)))
        return sorted(found, key=lambda container: container.created, reverse=True)

    def seek(self, word: str) -> Container | None:
        """The container of this id or name, or the one whose id begins so; None where there is none.

        Raises ContainerError, with status 1, where there are several.
        """
        containers = self.all()
        for container in containers:
            if word in (container.id, container.name):
                return container
        matches = [container for container in containers if word and container.id.startswith(word)]
        if len(matches) > 1:
            raise ContainerError(f"{word} begins the ids of {len(matches)} containers; write more of it", 1)
        return matches[0] if matches else None

    def find(self, word: str) -> Container:
        """As `seek`, but NoContainerError where there is none."""
        container = self.seek(word)
        if container is None:
            raise NoContainerError(word)
        return container

    def naming(self) -> contextlib.AbstractContextManager[None]:
        """Hold this from the look whether a name is free to its taking."""
        return lock(self.root / "containers.tmp" / "lock", what="names")

    def check_free(self, name: str) -> None:
        """Raises ContainerError where a container has this name; call it while `naming`."""
        for other in self.all():
            if other.name == name:
                raise ContainerError(
                    f"the name {name} is taken by container {other.short_id}; remove or rename that one"
                )

    def add(self, container: Container) -> None:
        """Bring a container that was built under containers.tmp into being. Call it while `naming`."""
        home = self.root / "containers" / container.id
        container.write()
        os.rename(container.directory, home)
        sync_directory(home.parent)

    def discard(self, container: Container) -> None:
        """Remove all there is of a container that is not mounted and does not run; the lock is held."""
        # rmdir refuses a mountpoint, so nothing is ever removed through a mount.
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(container.root)
        grave = self.root / "containers.tmp" / container.id
        with removing(container.directory):
            os.rename(container.directory, grave)
            remove_tree(grave)

    def sweep(self) -> None:
        """Remove what commands that were killed left half made or half removed."""
        with contextlib.ExitStack() as locks:
            abandoned = []
            with self.naming():
                for entry in os.scandir(self.root / "containers.tmp"):
                    if entry.is_dir(follow_symlinks=False) and (held := _try_lock(entry.path)) is not None:
                        locks.callback(os.close, held)
                        abandoned.append(Path(entry.path))
            for path in abandoned:
                remove_tree(path)


@contextlib.contextmanager
def removing(directory: Path) -> Iterator[None]:
    """Keep `sweep` from a directory, wherever it is moved, while the block removes it.

    Two that remove it would fail for each other; a lock file in it would go before the rest.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _try_lock(directory: str) -> int | None:
    """A descriptor of a directory that nobody is removing, locked as by `removing`; None where somebody is."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def remove_tree(path: Path) -> None:
    """Remove a directory, however deep; never through a mount. Raises ContainerError."""
    done = subprocess.run(
        ["rm", "-rf", "--one-file-system", "--", path], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise ContainerError(f"cannot remove {path}: {done.stderr.strip().splitlines()[-1]}")
