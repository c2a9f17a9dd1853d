"""Named volumes: `volumes/NAME/_data`, and beside it a file `anonymous` for those that were given no name."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from overlayfs_py.runtime import names
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.spec import Volume
from overlayfs_py.runtime.state import Containers, lock, make_directory, remove_tree, removing
from overlayfs_py.sys.paths import fd_path, open_in_root


@dataclass(frozen=True, slots=True)
class NamedVolume:
    """A volume as it is on disk; `path` is where its data is, `created` seconds since the epoch."""

    name: str
    path: Path
    anonymous: bool
    created: float


def all_volumes(containers: Containers) -> list[NamedVolume]:
    """Every volume, by name."""
    found = []
    for entry in sorted(os.scandir(containers.root / "volumes"), key=lambda entry: entry.name):
        # One that is removed while we look is none.
        with contextlib.suppress(FileNotFoundError):
            found.append(_read(Path(entry.path)))
    return found


def find(containers: Containers, name: str) -> NamedVolume:
    """The volume of this name. Raises ContainerError, with status 1."""
    try:
        return _read(containers.root / "volumes" / names.check(name, "volume"))
    except FileNotFoundError:
        raise ContainerError(f"no such volume: {name}", 1) from None


def _read(home: Path) -> NamedVolume:
    return NamedVolume(home.name, home / "_data", (home / "anonymous").exists(), os.stat(home).st_ctime)


def ensure(containers: Containers, name: str, *, anonymous: bool = False) -> NamedVolume:
    """The volume of this name, made where there is none; call it while `naming`."""
    home = containers.root / "volumes" / names.check(name, "volume")
    if not home.exists():
        make_directory(home, 0o711)
        if anonymous:
            (home / "anonymous").touch()
    make_directory(home / "_data", 0o755)
    return _read(home)


def users_of(containers: Containers, name: str) -> list[str]:
    """The names of the containers that have this volume."""
    return [
        container.name
        for container in containers.all()
        if any(volume.name == name for volume in container.spec.volumes)
    ]


def remove(containers: Containers, name: str) -> None:
    """Remove a volume that no container has, with its data. Raises ContainerError, with status 1."""
    with contextlib.ExitStack() as held:
        with containers.naming():
            volume = find(containers, name)
            users = users_of(containers, name)
            if users:
                raise ContainerError(f"volume {name} is in use by container {', '.join(users)}", 1)
            grave = containers.root / "containers.tmp" / f"volume-{names.new_id()}"
            held.enter_context(removing(volume.path.parent))
            os.rename(volume.path.parent, grave)
        remove_tree(grave)


def fill(volume: NamedVolume, root_fd: int, target: str) -> None:
    """Give a volume that is empty what the image has at its target, owner and mode too. Raises ContainerError."""
    try:
        source = open_in_root(
            root_fd, target.lstrip("/").encode("utf-8", "surrogateescape"), os.O_RDONLY | os.O_NONBLOCK
        )
    except OSError:
        # Whatever is wrong with the target, the OCI runtime makes it or says so.
        return
    home = volume.path.parent
    try:
        if not stat.S_ISDIR(os.fstat(source).st_mode):
            return
        with lock(home / "lock", what=volume.name):
            # The mark tells a volume that a copy which was killed has filled in part.
            mark = home / "filling"
            if os.listdir(volume.path) and not mark.exists():
                return
            mark.touch()
            _copy(source, volume)
            mark.unlink()
    finally:
        os.close(source)


def _copy(source: int, volume: NamedVolume) -> None:
    done = subprocess.run(
        ["cp", "-aT", "--", fd_path(source) + b"/.", volume.path],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        pass_fds=(source,),
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines() or ["cp failed"]
        raise ContainerError(f"cannot fill the volume {volume.name}: {reason[-1]}")


def mounts(containers: Containers, volumes: tuple[Volume, ...], root_fd: int) -> list[tuple[Path, str, bool, str]]:
    """Source, target, whether read-only, and propagation of each volume; empty named ones are filled first."""
    found = []
    for volume in volumes:
        if volume.name is not None:
            named = find(containers, volume.name)
            fill(named, root_fd, volume.target)
            source = named.path
        else:
            source = Path(volume.source or "")
            if not source.exists():
                raise ContainerError(f"volume {volume.target}: there is no {source} any more")
        found.append((source, volume.target, volume.read_only, volume.propagation))
    return found
