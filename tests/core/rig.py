"""An overlay driven without FUSE: operations by path, and what it shows as plain values."""

import contextlib
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from overlayfs_py.config import MountConfig
from overlayfs_py.core.files import File
from overlayfs_py.core.nodes import Node
from overlayfs_py.core.ops import OPERATIONS
from overlayfs_py.core.overlay import Overlay
from overlayfs_py.core.readdir import Dir
from overlayfs_py.core.requests import Attr, Caller, Changes, drive

ROOT = Caller(0, 0, os.getpid(), 0o022)
ALICE = Caller(1000, 1000, os.getpid(), 0o022)


class Seen(NamedTuple):
    """What an overlay shows of one object. `group` is the first of the paths that are the same node."""

    kind: int
    mode: int
    uid: int
    gid: int
    rdev: int
    nlink: int
    size: int
    mtime_ns: int
    data: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]
    group: bytes

    def __repr__(self) -> str:
        words = [f"{stat.filemode(self.kind | self.mode)} {self.uid}:{self.gid} nlink {self.nlink} size {self.size}"]
        words += [f"mtime {self.mtime_ns}", repr(self.data[:40])]
        words += [f"{key!r}={value!r}" for key, value in self.xattrs]
        return " ".join(words) + (f" same as {self.group!r}" if self.group else "")


Tree = dict[bytes, Seen]


class Rig:
    """The operations of one overlay, by path; every node met is referred to, as the kernel would."""

    def __init__(self, fs: Overlay) -> None:
        self.fs = fs

    def call(self, row: str, *arguments: Any, **named: Any) -> Any:
        """Run an operation of the table to its end."""
        outcome = OPERATIONS[row](self.fs, *arguments, **named)
        return drive(outcome) if hasattr(outcome, "send") else outcome

    def node(self, path: bytes) -> Node:
        """The node at a path."""
        node = self.fs.root
        for name in path.split(b"/") if path else ():
            node, _ = self.call("lookup", node, name)
            node.lookups = node.lookups or 1
        return node

    def place(self, path: bytes) -> tuple[Node, bytes]:
        """The directory and the name a path means."""
        folder, _, name = path.rpartition(b"/")
        return self.node(folder), name

    def exists(self, path: bytes) -> bool:
        try:
            self.node(path)
        except FileNotFoundError:
            return False
        return True

    def attr(self, path: bytes) -> Attr:
        attr: Attr = self.call("getattr", self.node(path))
        return attr

    def names(self, path: bytes = b"") -> set[bytes]:
        node = self.node(path)
        opened: Dir = self.call("opendir", node)
        try:
            listed: list[bytes] = self.call("readdir", opened, 0)
            assert len(listed) == len(set(listed)), listed
            return set(listed)
        finally:
            self.call("releasedir", opened)

    def open(self, path: bytes, flags: int = os.O_RDONLY) -> File:
        file: File = self.call("open", self.node(path), flags)
        return file

    @contextlib.contextmanager
    def opened(self, path: bytes, flags: int = os.O_RDONLY) -> Iterator[File]:
        file = self.open(path, flags)
        try:
            yield file
        finally:
            self.call("release", file)

    def read(self, path: bytes) -> bytes:
        with self.opened(path) as file:
            return self.read_file(file)

    def read_file(self, file: File) -> bytes:
        """All that an open file holds."""
        data = b""
        while part := self.call("read", file, len(data), 1 << 20):
            data += part
        return data

    def write(self, path: bytes, data: bytes, offset: int = 0, flags: int = os.O_WRONLY) -> None:
        with self.opened(path, flags) as file:
            assert self.call("write", file, offset, data) == len(data)

    def create(self, path: bytes, data: bytes = b"", mode: int = 0o644, caller: Caller = ROOT) -> Node:
        node, file = self.call("create", caller, *self.place(path), mode)
        node.lookups += 1
        try:
            if data:
                self.call("write", file, 0, data)
        finally:
            self.call("release", file)
        made: Node = node
        return made

    def mkdir(self, path: bytes, mode: int = 0o755, caller: Caller = ROOT) -> Node:
        return self._new(self.call("mkdir", caller, *self.place(path), mode))

    def mknod(self, path: bytes, mode: int, rdev: int = 0, caller: Caller = ROOT) -> Node:
        return self._new(self.call("mknod", caller, *self.place(path), mode, rdev))

    def symlink(self, target: bytes, path: bytes, caller: Caller = ROOT) -> Node:
        return self._new(self.call("symlink", caller, *self.place(path), target))

    def link(self, old: bytes, new: bytes) -> Node:
        return self._new(self.call("link", self.node(old), *self.place(new)))

    @staticmethod
    def _new(node: Node) -> Node:
        node.lookups += 1
        return node

    def unlink(self, path: bytes) -> None:
        self.call("unlink", *self.place(path))

    def rmdir(self, path: bytes) -> None:
        self.call("rmdir", *self.place(path))

    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        self.call("rename", *self.place(old), *self.place(new), flags)

    def change(self, path: bytes, **changes: Any) -> Attr:
        attr: Attr = self.call("setattr", self.node(path), Changes(**changes))
        return attr

    def readlink(self, path: bytes) -> bytes:
        target: bytes = self.call("readlink", self.node(path))
        return target

    def getxattr(self, path: bytes, key: bytes) -> bytes:
        value: bytes = self.call("getxattr", self.node(path), key)
        return value

    def setxattr(self, path: bytes, key: bytes, value: bytes, flags: int = 0) -> None:
        self.call("setxattr", self.node(path), key, value, flags)

    def removexattr(self, path: bytes, key: bytes) -> None:
        self.call("removexattr", self.node(path), key)

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        node = self.node(path)
        return {key: self.call("getxattr", node, key) for key in self.call("listxattr", node)}

    def forget(self, node: Node) -> None:
        """All the kernel's references to a node go."""
        self.call("forget", node, node.lookups)

    def tree(self, cache: dict[tuple[int, bytes, int], Seen] | None = None) -> Tree:
        """Everything the overlay shows, by path; the root is b"".

        With `cache`, what is in lower layers alone is looked at once, for as many overlays over them as share it.
        """
        tree: Tree = {}
        first: dict[Node, bytes] = {}
        pending = [b""]
        while pending:
            path = pending.pop()
            node = self.node(path)
            group = first.setdefault(node, path)
            if cache is None or node.upper is not None or node.pinned >= 0:
                tree[path] = self._seen(node, group)
            else:
                real = node.lowers[0]
                key = (real.layer.index, real.path(), len(node.lowers))
                if key not in cache:
                    cache[key] = self._seen(node, group)
                tree[path] = cache[key]._replace(group=group)
            if node.kind == stat.S_IFDIR:
                pending += [path + b"/" + name if path else name for name in sorted(self.names(path), reverse=True)]
        # A path is the same as an earlier one only where there are several.
        return {path: seen._replace(group=b"" if seen.group == path else seen.group) for path, seen in tree.items()}

    def _seen(self, node: Node, group: bytes) -> Seen:
        attr: Attr = self.call("getattr", node)
        directory = node.kind == stat.S_IFDIR
        data = b""
        if node.kind == stat.S_IFREG:
            file = self.call("open", node, os.O_RDONLY)
            data = self.read_file(file)
            self.call("release", file)
        elif node.kind == stat.S_IFLNK:
            data = self.call("readlink", node)
        keys: list[bytes] = self.call("listxattr", node)
        return Seen(
            node.kind,
            stat.S_IMODE(attr.mode),
            attr.uid,
            attr.gid,
            attr.rdev,
            0 if directory else attr.nlink,
            0 if directory else attr.size,
            attr.mtime_ns,
            data,
            tuple(sorted((key, self.call("getxattr", node, key)) for key in keys)),
            group,
        )


def configure(
    lowers: Sequence[Path], upper: Path | None = None, work: Path | None = None, **options: Any
) -> MountConfig:
    """The configuration of a stack, topmost lower first."""
    return MountConfig(
        lowerdirs=tuple(os.fsencode(lower) for lower in lowers),
        upperdir=os.fsencode(upper) if upper else None,
        workdir=os.fsencode(work) if work else None,
        mountpoint=b"/nowhere",
        **options,
    )


@contextlib.contextmanager
def overlay(
    lowers: Sequence[Path], upper: Path | None = None, work: Path | None = None, **options: Any
) -> Iterator[Rig]:
    """An overlay over these layers, closed at the end."""
    fs = Overlay.open(configure(lowers, upper, work, **options))
    try:
        yield Rig(fs)
    finally:
        fs.close()


def differences(left: Tree, right: Tree, *, timeless: Collection[int] = ()) -> list[str]:
    """How two trees differ, a line each; when something of the `timeless` kinds was changed counts for nothing."""
    lines = []
    for path in sorted(left.keys() | right.keys()):
        one, other = left.get(path), right.get(path)
        if one is not None and other is not None and one.kind in timeless:
            one, other = one._replace(mtime_ns=0), other._replace(mtime_ns=0)
        if one != other:
            lines.append(f"{path!r}:\n    {one}\n    {other}")
    return lines
