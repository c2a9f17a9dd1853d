"""Copying between the host and a container.

Whatever lies in the container, its links can't lead out of it: the side that is a container is read and written by a
child process that has made it its root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn, cast

from overlayfs_py.runtime import root
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.state import Container, Status
from overlayfs_py.sys.paths import open_in_root

_SAID = 4096  # bytes of a child's error


@dataclass(frozen=True, slots=True)
class Place:
    """A path on the host, or below the root of a container that `root_fd` is open on."""

    path: str
    root_fd: int | None = None

    def kind(self, *, follow: bool) -> int | None:
        """The file type bits of what is there, as in st_mode; None where nothing is. Raises OSError."""
        try:
            if self.root_fd is None:
                return stat.S_IFMT(os.stat(self.path, follow_symlinks=follow).st_mode)
            flags = os.O_PATH | (0 if follow else os.O_NOFOLLOW)
            fd = open_in_root(self.root_fd, os.fsencode(self.path), flags)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return stat.S_IFMT(os.fstat(fd).st_mode)
        finally:
            os.close(fd)

    def enter(self) -> None:
        """Make the container's root that of this process."""
        if self.root_fd is not None:
            os.fchdir(self.root_fd)
            os.chroot(".")
            os.chdir("/")


@contextlib.contextmanager
def opened(container: Container, status: Status) -> Iterator[int]:
    """A descriptor of the container's root, volumes included if it runs; one that does not is mounted meanwhile.

    The caller holds the lock of a container that does not run. Raises ContainerError.
    """
    with contextlib.ExitStack() as stack:
        path = str(container.root)
        if status.process is not None:
            path = f"/proc/{status.process.pid}/root"
        else:
            mounted = root.mount_root(container)
            stack.callback(root.unmount, container, mounted)
        try:
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ContainerError(f"container {container.name} has ended") from None
        stack.callback(os.close, fd)
        yield fd


def copy(source: Place, target: Place, *, follow: bool, archive: bool) -> None:
    """Copy a file or directory as `cp -a` does; `archive` keeps the owners.

    A source that ends with `/.` is the content of that directory. Raises ContainerError.
    """
    content = source.path.endswith("/.")
    follow = follow or source.path.endswith("/") or content
    kind = source.kind(follow=follow)
    if kind is None:
        raise ContainerError(f"there is no {source.path}")
    directory, name = _landing(source, target, is_dir=kind == stat.S_IFDIR, content=content)
    owner = None if archive else (0, 0) if target.root_fd is not None else (os.geteuid(), os.getegid())
    _pipe(
        lambda out: pack(source, name, out, follow=follow),
        lambda given: unpack(Place(directory, target.root_fd), given, owner=owner),
    )


def _landing(source: Place, target: Place, *, is_dir: bool, content: bool) -> tuple[str, str]:
    """The directory to unpack in, and the name to give there ('.' for a directory's content). Source: docker-cp(1)."""
    there = target.kind(follow=True)
    if there == stat.S_IFDIR:
        return target.path, "." if content else posixpath.basename(posixpath.normpath(source.path)) or "."
    if is_dir and there is not None:
        raise ContainerError(f"{target.path} is no directory, so a directory can't go there")
    if not is_dir and target.path.endswith("/"):
        raise ContainerError(f"there is no directory {target.path}")
    plain = posixpath.normpath(target.path)
    parent = posixpath.dirname(plain) or "."
    if Place(parent, target.root_fd).kind(follow=True) != stat.S_IFDIR:
        raise ContainerError(f"there is no directory {parent}")
    return parent, posixpath.basename(plain)


def pack(source: Place, name: str, out: BinaryIO, *, follow: bool) -> None:
    """Write a tar stream of the source, called `name` in it. For a process of its own."""
    source.enter()
    # Names of owners would be looked up by code of the container.
    vars(tarfile).update(pwd=None, grp=None)
    path = os.path.realpath(source.path) if follow else source.path
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        archive.add(path, arcname=name)


def unpack(target: Place, given: BinaryIO, *, owner: tuple[int, int] | None) -> None:
    """Make what a tar stream holds in the directory, all of it owned by `owner` if given. For a process of its own."""
    target.enter()
    os.chdir(target.path)

    def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        for member in archive:
            if owner is not None:
                member.uid, member.gid = owner
            _clear(member)
            yield member

    with tarfile.open(fileobj=given, mode="r|") as archive:
        # What a stream holds goes below the container's root, or comes from `pack`.
        archive.extraction_filter = lambda member, _: member
        archive.extractall(".", members(archive), numeric_owner=True)


def _clear(member: tarfile.TarInfo) -> None:
    """Remove what is in the way of a member, as cp --remove-destination would; directories stay."""
    if member.isdir():
        return
    try:
        os.unlink(member.name)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        raise OSError(errno.EISDIR, "a directory is in the way", member.name) from None


def _pipe(write: Callable[[BinaryIO], None], read: Callable[[BinaryIO], None]) -> None:
    """Run both ends in a process each. Raises ContainerError with what the first that failed says."""
    out, into = os.pipe()
    children = [_child(into, "wb", write, out), _child(out, "rb", read, into)]
    os.close(out)
    os.close(into)
    join(children)


def run(fd: int, mode: str, work: Callable[[BinaryIO], None]) -> None:
    """Run one end in a process of its own, on a descriptor of ours. Raises ContainerError."""
    join([_child(fd, mode, work, None)])


def join(children: list[tuple[int, int]]) -> None:
    failures = []
    for pid, said in children:
        with open(said, "rb") as pipe:
            message = pipe.read()
        status = os.waitpid(pid, 0)[1]
        if status != 0:
            failures.append(message.decode("utf-8", "backslashreplace") or "it was killed")
    if failures:
        # An end whose other end has failed says no more than that.
        telling = [failure for failure in failures if "Broken pipe" not in failure and "end of file" not in failure]
        raise ContainerError(f"cannot copy: {(telling or failures)[0]}")


def _child(fd: int, mode: str, work: Callable[[BinaryIO], None], other: int | None) -> tuple[int, int]:
    """A process that does one end of the work: its pid, and a pipe with what it says when it fails."""
    said, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(said)
        if other is not None:
            os.close(other)
        _work(fd, mode, work, say)
    os.close(say)
    return pid, said


def _work(fd: int, mode: str, work: Callable[[BinaryIO], None], say: int) -> NoReturn:
    status = 1
    try:
        with open(fd, mode) as stream:
            work(cast(BinaryIO, stream))
        status = 0
    except (OSError, tarfile.TarError) as error:
        where = getattr(error, "filename", None)
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        os.write(say, f"{where}: {text}".encode(errors="backslashreplace")[:_SAID] if where else text.encode()[:_SAID])
    finally:
        os._exit(status)
