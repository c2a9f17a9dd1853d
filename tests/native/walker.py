"""One client under stress: random operations in a directory, each checked against a model in memory."""

import contextlib
import ctypes
import errno
import mmap
import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.syscalls import RENAME_EXCHANGE, renameat2

Seen = dict[str, tuple[int, int, bytes, tuple[tuple[str, bytes], ...], str]]

_MOST_NAMES: Final = 60
_MOST_BYTES: Final = 200_000
_MOST_OPEN: Final = 6
_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Diverged(AssertionError):
    """The filesystem shows something else than what was done."""


@dataclass(slots=True, eq=False)
class Inode:
    """What a name leads to; `data` is the target of a symbolic link."""

    kind: int
    mode: int
    data: bytearray = field(default_factory=bytearray)
    xattrs: dict[str, bytes] = field(default_factory=dict)

    def write(self, offset: int, data: bytes) -> None:
        self.resize(max(len(self.data), offset + len(data)))
        self.data[offset : offset + len(data)] = data

    def resize(self, size: int) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))


def seen(names: dict[str, Inode]) -> Seen:
    """Each path's kind, permissions, content, xattrs, and the first path that is the same inode."""
    first: dict[int, str] = {}
    return {
        path: (
            inode.kind,
            inode.mode,
            bytes(inode.data),
            tuple(sorted(inode.xattrs.items())),
            first.setdefault(id(inode), path),
        )
        for path, inode in sorted(names.items())
    }


def read_names(root: Path) -> dict[str, Inode]:
    """What is on disk below `root`."""
    names: dict[str, Inode] = {}
    inodes: dict[tuple[int, int], Inode] = {}
    for folder, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = os.path.join(folder, name)
            st = os.lstat(path)
            inode = inodes.get((st.st_dev, st.st_ino))
            if inode is None:
                inode = Inode(stat.S_IFMT(st.st_mode), stat.S_IMODE(st.st_mode))
                inodes[st.st_dev, st.st_ino] = inode
                if inode.kind == stat.S_IFREG:
                    inode.data = bytearray(Path(path).read_bytes())
                elif inode.kind == stat.S_IFLNK:
                    inode.data = bytearray(os.fsencode(os.readlink(path)))
                for key in os.listxattr(path, follow_symlinks=False):
                    if key.startswith("user."):
                        inode.xattrs[key] = os.getxattr(path, key, follow_symlinks=False)
            names[os.path.relpath(path, root)] = inode
    return names


def differences(expected: Seen, found: Seen) -> list[str]:
    """Paths that are not the same, with what is other about each."""
    lines = []
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            lines.append(f"{path}: {_brief(expected.get(path))} expected, {_brief(found.get(path))} found")
    return lines


def other_bytes(found: bytes, expected: bytes | bytearray) -> str:
    """Where two contents differ, and whether there is something else or nothing."""
    wrong = [at for at, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]]
    if not wrong:
        return f"{len(found)} bytes instead of {len(expected)}"
    part = found[wrong[0] : wrong[-1] + 1]
    what = "nought" if not any(part) else "something else"
    return f"of {len(expected)} bytes, {len(found)} found, {wrong[0]} to {wrong[-1]} are {what}"


def _brief(entry: tuple[int, int, bytes, tuple[tuple[str, bytes], ...], str] | None) -> str:
    if entry is None:
        return "nothing"
    kind, mode, data, xattrs, group = entry
    return f"{stat.filemode(kind | mode)} {len(data)} bytes {hash(data) & 0xFFFF:04x} {dict(xattrs)} as {group}"


class Walker:
    """A random walk through the directory `root`, of which nobody else changes anything."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.dice = random.Random(seed)
        # In one order, so that a seed gives one walk.
        self.names = dict(sorted(read_names(root).items()))
        self.open: list[tuple[int, Inode]] = []
        self.serial = 0
        self.count = 0
        self.last = "nothing"

    def step(self) -> None:
        """One operation; raises Diverged or OSError where it goes another way than it should."""
        operation = self.dice.choice(_OPERATIONS)
        self.last = operation.__name__
        try:
            operation(self)
        except _Impossible:
            return
        self.count += 1

    def check(self) -> None:
        """Compare the whole directory with the model; raises Diverged."""
        different = differences(seen(self.names), seen(read_names(self.root)))
        if different:
            raise Diverged("\n".join(different[:20]))

    def close(self) -> None:
        """Close what is kept open, the content compared once more."""
        while self.open:
            descriptor, inode = self.open.pop()
            self._compare(descriptor, inode)
            os.close(descriptor)

    def at(self, path: str) -> str:
        return os.path.join(self.root, path)

    def pick(self, *kinds: int) -> str:
        found = [path for path, inode in self.names.items() if inode.kind in kinds]
        if not found:
            raise _Impossible
        return self.dice.choice(found)

    def file(self) -> str:
        return self.pick(stat.S_IFREG)

    def fresh(self) -> str:
        """A free name in some directory."""
        if len(self.names) >= _MOST_NAMES:
            raise _Impossible
        self.serial += 1
        folders = [path for path, inode in self.names.items() if inode.kind == stat.S_IFDIR]
        return os.path.join(self.dice.choice([*folders, ""]), f"n{self.serial}")

    def bytes(self, most: int = 20_000) -> bytes:
        return self.dice.randbytes(self.dice.randrange(1, most))

    def offset(self, inode: Inode) -> int:
        return self.dice.randrange(min(len(inode.data) + 5000, _MOST_BYTES))

    @contextlib.contextmanager
    def opened(self, path: str, flags: int) -> Iterator[int]:
        descriptor = os.open(self.at(path), flags)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _compare(self, descriptor: int, inode: Inode) -> None:
        found = os.pread(descriptor, len(inode.data) + 1, 0)
        if found != inode.data:
            raise Diverged(other_bytes(found, inode.data))
        links = sum(other is inode for other in self.names.values())
        if os.fstat(descriptor).st_nlink != links:
            raise Diverged(f"{os.fstat(descriptor).st_nlink} links instead of {links}")


class _Impossible(Exception):
    """An operation that has nothing to work on just now."""


def _write(descriptor: int, inode: Inode, offset: int, data: bytes) -> None:
    written = os.pwrite(descriptor, data, offset)
    if written != len(data):
        raise Diverged(f"{written} bytes written of {len(data)}")
    inode.write(offset, data)


def create(w: Walker) -> None:
    path, inode = w.fresh(), Inode(stat.S_IFREG, 0o640)
    descriptor = os.open(w.at(path), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o640)
    try:
        w.names[path] = inode
        _write(descriptor, inode, 0, w.bytes())
    finally:
        os.close(descriptor)


def overwrite(w: Walker) -> None:
    path = w.file()
    inode = w.names[path]
    with w.opened(path, os.O_WRONLY) as descriptor:
        _write(descriptor, inode, w.offset(inode), w.bytes())


def append(w: Walker) -> None:
    path = w.file()
    inode, data = w.names[path], w.bytes(3000)
    if len(inode.data) > _MOST_BYTES:
        raise _Impossible
    with w.opened(path, os.O_WRONLY | os.O_APPEND) as descriptor:
        os.write(descriptor, data)
    inode.write(len(inode.data), data)


def read(w: Walker) -> None:
    path = w.file()
    inode = w.names[path]
    offset = w.offset(inode)
    with w.opened(path, os.O_RDONLY) as descriptor:
        found = os.pread(descriptor, 30_000, offset)
    if found != inode.data[offset : offset + 30_000]:
        raise Diverged(f"{path} at {offset}: {other_bytes(found, inode.data[offset : offset + 30_000])}")


def write_mapped(w: Walker) -> None:
    path = w.file()
    inode = w.names[path]
    if not inode.data:
        raise _Impossible
    offset = w.dice.randrange(len(inode.data))
    data = w.bytes()[: len(inode.data) - offset]
    with w.opened(path, os.O_RDWR) as descriptor, mmap.mmap(descriptor, len(inode.data)) as mapped:
        if mapped[:] != inode.data:
            raise Diverged(f"{path} mapped: {other_bytes(mapped[:], inode.data)}")
        mapped[offset : offset + len(data)] = data
        if w.dice.random() < 0.5:
            mapped.flush()
    inode.write(offset, data)


def truncate(w: Walker) -> None:
    path = w.file()
    size = w.dice.randrange(_MOST_BYTES)
    os.truncate(w.at(path), size)
    w.names[path].resize(size)


def allocate(w: Walker) -> None:
    path = w.file()
    inode = w.names[path]
    offset, length = w.offset(inode), w.dice.randrange(1, 20_000)
    mode = w.dice.choice((0, _KEEP_SIZE, _KEEP_SIZE | _PUNCH_HOLE))
    with w.opened(path, os.O_RDWR) as descriptor:
        if _libc.fallocate(descriptor, mode, ctypes.c_long(offset), ctypes.c_long(length)):
            raise OSError(ctypes.get_errno(), "fallocate")
    if mode == 0:
        inode.resize(max(len(inode.data), offset + length))
    elif mode & _PUNCH_HOLE:
        end = min(len(inode.data), offset + length)
        inode.data[offset:end] = bytes(max(0, end - offset))


def copy_range(w: Walker) -> None:
    source, target = w.file(), w.file()
    here, there = w.names[source], w.names[target]
    if here is there:
        raise _Impossible
    start, offset = w.offset(here), w.offset(there)
    with w.opened(source, os.O_RDONLY) as reading, w.opened(target, os.O_RDWR) as writing:
        count = os.copy_file_range(reading, writing, 30_000, start, offset)
    if count:
        there.write(offset, bytes(here.data[start : start + count]))
    if start < len(here.data) and count == 0:
        raise Diverged("nothing copied")


def rename(w: Walker) -> None:
    old = w.pick(stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
    new = w.fresh()
    if new.startswith(old + "/"):
        raise _Impossible
    os.rename(w.at(old), w.at(new))
    for path in [path for path in w.names if path == old or path.startswith(old + "/")]:
        w.names[new + path[len(old) :]] = w.names.pop(path)


def rename_over(w: Walker) -> None:
    old, new = w.file(), w.file()
    os.rename(w.at(old), w.at(new))
    if w.names[old] is not w.names[new]:
        w.names[new] = w.names.pop(old)


def exchange(w: Walker) -> None:
    one, other = w.file(), w.pick(stat.S_IFREG, stat.S_IFLNK)
    renameat2(os.fsencode(w.at(one)), os.fsencode(w.at(other)), RENAME_EXCHANGE)
    w.names[one], w.names[other] = w.names[other], w.names[one]


def link(w: Walker) -> None:
    old, new = w.file(), w.fresh()
    os.link(w.at(old), w.at(new))
    w.names[new] = w.names[old]


def unlink(w: Walker) -> None:
    path = w.pick(stat.S_IFREG, stat.S_IFLNK)
    if len(w.names) < 15:
        raise _Impossible
    os.unlink(w.at(path))
    del w.names[path]


def make_directory(w: Walker) -> None:
    path = w.fresh()
    os.mkdir(w.at(path), 0o750)
    w.names[path] = Inode(stat.S_IFDIR, 0o750)


def remove_directory(w: Walker) -> None:
    path = w.pick(stat.S_IFDIR)
    full = any(other.startswith(path + "/") for other in w.names)
    try:
        os.rmdir(w.at(path))
    except OSError as error:
        if not full or error.errno != errno.ENOTEMPTY:
            raise
        return
    if full:
        raise Diverged(f"{path} was removed, though not empty")
    del w.names[path]


def symlink(w: Walker) -> None:
    path, target = w.fresh(), os.fsencode(f"to/{w.serial}")
    os.symlink(target, w.at(path))
    w.names[path] = Inode(stat.S_IFLNK, 0o777, bytearray(target))


def read_link(w: Walker) -> None:
    path = w.pick(stat.S_IFLNK)
    if os.fsencode(os.readlink(w.at(path))) != w.names[path].data:
        raise Diverged(f"{path} leads elsewhere")


def set_xattr(w: Walker) -> None:
    path = w.pick(stat.S_IFREG, stat.S_IFDIR)
    key, value = f"user.k{w.dice.randrange(4)}", w.bytes(200)
    os.setxattr(w.at(path), key, value)
    w.names[path].xattrs[key] = value


def remove_xattr(w: Walker) -> None:
    path = w.pick(stat.S_IFREG, stat.S_IFDIR)
    xattrs = w.names[path].xattrs
    if not xattrs:
        raise _Impossible
    key = w.dice.choice(sorted(xattrs))
    os.removexattr(w.at(path), key)
    del xattrs[key]


def change_mode(w: Walker) -> None:
    path = w.pick(stat.S_IFREG, stat.S_IFDIR)
    mode = w.dice.choice((0o700, 0o711, 0o755))
    os.chmod(w.at(path), mode)
    w.names[path].mode = mode


def list_directory(w: Walker) -> None:
    folder = w.dice.choice([path for path, inode in w.names.items() if inode.kind == stat.S_IFDIR] + [""])
    expected = sorted(os.path.basename(path) for path in w.names if os.path.dirname(path) == folder)
    found = sorted(os.listdir(w.at(folder)))
    if found != expected:
        raise Diverged(f"{folder!r} lists {found} instead of {expected}")


def open_and_keep(w: Walker) -> None:
    if len(w.open) >= _MOST_OPEN:
        raise _Impossible
    path = w.file()
    w.open.append((os.open(w.at(path), os.O_RDWR), w.names[path]))


def make_nameless(w: Walker) -> None:
    if len(w.open) >= _MOST_OPEN:
        raise _Impossible
    folder = w.dice.choice([path for path, inode in w.names.items() if inode.kind == stat.S_IFDIR] + [""])
    descriptor = os.open(w.at(folder), os.O_TMPFILE | os.O_RDWR, 0o640)
    inode = Inode(stat.S_IFREG, 0o640)
    w.open.append((descriptor, inode))
    _write(descriptor, inode, 0, w.bytes())
    if w.dice.random() < 0.5:
        path = w.fresh()
        with w.opened("", os.O_RDONLY) as root:
            # Only linkat(2) follows the symbolic link, and Python takes link(2) where it is told of no directory.
            os.link(f"/proc/self/fd/{descriptor}", path, dst_dir_fd=root, follow_symlinks=True)
        w.names[path] = inode


def use_kept(w: Walker) -> None:
    if not w.open:
        raise _Impossible
    descriptor, inode = w.dice.choice(w.open)
    if w.dice.random() < 0.5:
        _write(descriptor, inode, w.offset(inode), w.bytes())
    w._compare(descriptor, inode)


def close_kept(w: Walker) -> None:
    if not w.open:
        raise _Impossible
    descriptor, inode = w.open.pop(w.dice.randrange(len(w.open)))
    try:
        w._compare(descriptor, inode)
    finally:
        os.close(descriptor)


def sync(w: Walker) -> None:
    with w.opened(w.file(), os.O_RDWR) as descriptor:
        os.fdatasync(descriptor)


_OPERATIONS: Final[tuple[Callable[[Walker], None], ...]] = (
    *(
        create,
        overwrite,
        append,
        read,
        write_mapped,
        truncate,
        allocate,
        copy_range,
        rename,
        rename_over,
        exchange,
        link,
    ),
    *(unlink, unlink, make_directory, remove_directory, symlink, read_link, set_xattr, remove_xattr, change_mode),
    *(list_directory, open_and_keep, make_nameless, use_kept, use_kept, close_kept, sync),
)
