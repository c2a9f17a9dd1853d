"""Trees for tests: layers built from plain descriptions, any tree read back as plain values, two of them compared."""

import errno
import hashlib
import os
import re
import stat
import struct
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final, Literal

Kind = Literal["file", "dir", "symlink", "fifo", "socket", "chr", "blk", "whiteout", "link"]

TRUSTED: Final = "trusted.overlay."
USER: Final = "user.overlay."
ACL_ACCESS: Final = "system.posix_acl_access"
ACL_DEFAULT: Final = "system.posix_acl_default"

_EPOCH: Final = 1_600_000_000_123_456_789  # nanoseconds; far enough back to be told from the time of the run
_FORMATS: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "chr",
    stat.S_IFBLK: "blk",
}
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NOATIME
_SPECIAL: Final = {"fifo": stat.S_IFIFO, "chr": stat.S_IFCHR, "blk": stat.S_IFBLK}


@dataclass(frozen=True, slots=True)
class Node:
    """One object of a layer.

    `data` is a file's content, a symlink's target or, for a `link`, the path of the other name. `size`, when larger
    than the content, makes a hole behind it. An xattr named "@opaque" is the mark `opaque` in the namespace of the
    build. Parents that are not described are made.
    """

    path: bytes
    kind: Kind = "file"
    data: bytes = b""
    mode: int | None = None
    uid: int = 0
    gid: int = 0
    size: int = 0
    rdev: tuple[int, int] = (1, 3)
    xattrs: tuple[tuple[str, bytes], ...] = ()


Layer = tuple[Node, ...]
Stack = tuple[Layer, ...]  # topmost first


def acl(*entries: tuple[int, int, int]) -> bytes:
    """The xattr value of a POSIX ACL of (tag, permissions, id) entries; see linux/posix_acl_xattr.h."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def build(root: bytes, layer: Iterable[Node], prefix: str = TRUSTED) -> None:
    """Make a layer below the existing directory `root`; the same description gives the same tree each time.

    `prefix` is the namespace of the marks. Raises OSError when an object cannot be made.
    """
    made: list[tuple[bytes, int]] = [(root, _EPOCH)]
    for serial, node in enumerate(layer, 1):
        path = os.path.join(root, node.path) if node.path else root
        for parent in _missing_parents(root, node.path):
            os.mkdir(parent, 0o755)
            made.append((parent, _EPOCH))
        _make(root, path, node)
        for name, value in node.xattrs:
            os.setxattr(path, re.sub("^@", prefix, name), value, follow_symlinks=False)
        if node.kind != "link":
            made.append((path, _EPOCH + serial * 1_000_000_007))
    for path, when in reversed(made):
        os.utime(path, ns=(when, when + 5), follow_symlinks=False)


def _missing_parents(root: bytes, path: bytes) -> list[bytes]:
    missing = []
    parent = os.path.dirname(path)
    while parent and not os.path.lexists(os.path.join(root, parent)):
        missing.append(os.path.join(root, parent))
        parent = os.path.dirname(parent)
    return missing[::-1]


def _make(root: bytes, path: bytes, node: Node) -> None:
    if node.kind == "link":
        os.link(os.path.join(root, node.data), path, follow_symlinks=False)
        return
    if node.kind == "whiteout":
        os.mknod(path, stat.S_IFCHR, 0)
        return
    if node.kind == "symlink":
        os.symlink(node.data, path)
    elif node.kind == "dir":
        if node.path and not os.path.isdir(path):
            os.mkdir(path)
    elif node.kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif node.kind == "file":
        with open(path, "xb") as file:
            file.write(node.data)
            if node.size > len(node.data):
                file.truncate(node.size)
    else:
        os.mknod(path, _SPECIAL[node.kind] | 0o600, os.makedev(*node.rdev))
    os.chown(path, node.uid, node.gid, follow_symlinks=False)
    if node.kind != "symlink":
        os.chmod(path, node.mode if node.mode is not None else 0o755 if node.kind == "dir" else 0o644)


@dataclass(frozen=True, slots=True)
class Entry:
    """What can be seen of one object; `mtime` in nanoseconds, or "now" when it lies within the run.

    `group` is the first path, in sorted order, of those that are the same inode. `nlink` of a directory is 0 when it is
    right: two more than it has subdirectories, or 1, which says nothing about them.
    """

    kind: str
    mode: int = 0
    uid: int = 0
    gid: int = 0
    nlink: int = 0
    size: int = 0
    rdev: tuple[int, int] = (0, 0)
    mtime: int | str = 0
    atime: int | str = 0
    target: bytes = b""
    content: str = ""
    sparse: bool = False
    xattrs: tuple[tuple[str, bytes], ...] = ()
    group: bytes = b""
    foreign: bool = False  # on another device than the root of the tree


Tree = dict[bytes, Entry]


@dataclass(frozen=True, slots=True)
class Difference:
    """One field of one path on which two trees differ; a missing path differs in its kind."""

    path: bytes
    field: str
    left: object
    right: object


def clock(stamp: int, since: int) -> int | str:
    """A time in nanoseconds, or "now" when it lies between `since` (with two seconds of slack) and this moment."""
    slack = 2_000_000_000
    return "now" if since - slack <= stamp <= time.time_ns() + slack else stamp


def read_tree(root: bytes, since: int) -> Tree:
    """Everything below `root`, which has the path b".", at any depth.

    Changes no access times but those of symlinks, which are left out. An object that cannot be read is an entry
    whose kind is the error. `since` is the start of the run, see `clock`.
    """
    tree: Tree = {}
    inodes: dict[bytes, tuple[int, int]] = {}
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME)
    try:
        status = os.fstat(descriptor)
        tree[b"."] = _entry(descriptor, b".", status, since)
        _read_below(descriptor, b"", since, tree, inodes, status.st_dev)
    finally:
        os.close(descriptor)
    _check_directory_counts(tree)
    return _with_groups(tree, inodes)


def _check_directory_counts(tree: Tree) -> None:
    subdirectories = Counter(os.path.dirname(path) or b"." for path, entry in tree.items() if entry.kind == "dir")
    subdirectories[b"."] -= 1  # itself
    for path, entry in tree.items():
        if entry.kind == "dir" and entry.nlink in (1, 2 + subdirectories[path]):
            tree[path] = replace(entry, nlink=0)


def _read_below(
    directory: int, prefix: bytes, since: int, tree: Tree, inodes: dict[bytes, tuple[int, int]], device: int
) -> None:
    try:
        names = sorted(os.fsencode(name) for name in os.listdir(directory))
    except OSError as error:
        tree[prefix + b"*"] = Entry(f"listing: {error_name(error)}")
        return
    for name in names:
        path = prefix + name
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            inodes[path] = (status.st_dev, status.st_ino)
            tree[path] = replace(_entry(directory, name, status, since), foreign=status.st_dev != device)
        except OSError as error:
            tree[path] = Entry(f"error: {error_name(error)}")
            continue
        if stat.S_ISDIR(status.st_mode):
            try:
                below = os.open(name, _DIRECTORY, dir_fd=directory)
            except OSError as error:
                tree[path + b"/*"] = Entry(f"opening: {error_name(error)}")
                continue
            try:
                _read_below(below, path + b"/", since, tree, inodes, device)
            finally:
                os.close(below)


def _entry(directory: int, name: bytes, status: os.stat_result, since: int) -> Entry:
    kind = _FORMATS[stat.S_IFMT(status.st_mode)]
    through = b"/proc/self/fd/%d/%s" % (directory, name)
    size = 0 if kind == "dir" else status.st_size
    device = (os.major(status.st_rdev), os.minor(status.st_rdev)) if kind in ("chr", "blk") else (0, 0)
    if kind == "chr" and device == (0, 0):
        kind = "whiteout"
    return Entry(
        kind=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        nlink=status.st_nlink,
        size=size,
        rdev=device,
        mtime=clock(status.st_mtime_ns, since),
        # Looking at a symlink's target is enough to change its access time.
        atime=0 if kind == "symlink" else clock(status.st_atime_ns, since),
        target=os.readlink(name, dir_fd=directory) if kind == "symlink" else b"",
        content=_digest(directory, name) if kind == "file" else "",
        # A few blocks may hold extended attributes instead of data.
        sparse=kind == "file" and status.st_blocks * 512 * 2 < size - 8192,
        xattrs=read_xattrs(through),
    )


def read_xattrs(path: bytes) -> tuple[tuple[str, bytes], ...]:
    """All xattrs of an object, not following a symlink, sorted by name."""
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)


def _digest(directory: int, name: bytes) -> str:
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME, dir_fd=directory)
    try:
        digest = hashlib.sha256()
        head = block = os.read(descriptor, 1 << 18)
        length = 0
        while block:
            digest.update(block)
            length += len(block)
            block = os.read(descriptor, 1 << 18)
    finally:
        os.close(descriptor)
    return f"{length} bytes, {digest.hexdigest()[:12]}, {head[:24]!r}…" if length else "empty"


def _with_groups(tree: Tree, inodes: Mapping[bytes, tuple[int, int]]) -> Tree:
    first: dict[tuple[int, int], bytes] = {}
    for path in sorted(inodes):
        first.setdefault(inodes[path], path)
    for path, inode in inodes.items():
        tree[path] = replace(tree[path], group=first[inode])
    return tree


def compare_trees(left: Tree, right: Tree, ignore: Sequence[str] = ()) -> list[Difference]:
    """Where two trees differ, by path and then by field; `ignore` names fields of Entry."""
    found = []
    names = [field.name for field in fields(Entry) if field.name not in ignore]
    for path in sorted(left.keys() | right.keys()):
        one, other = left.get(path), right.get(path)
        if one is None or other is None or one.kind != other.kind:
            found.append(Difference(path, "kind", one and one.kind, other and other.kind))
            continue
        for name in names:
            if getattr(one, name) != getattr(other, name):
                found.append(Difference(path, name, getattr(one, name), getattr(other, name)))
    return found


def show_tree(tree: Tree) -> str:
    """A tree as text, one object a line."""
    return "\n".join(_show(path, entry) for path, entry in sorted(tree.items()))


def _show(path: bytes, entry: Entry) -> str:
    words = [f"{entry.kind:8} {entry.mode:04o} {entry.uid}:{entry.gid} nlink {entry.nlink}"]
    if entry.kind == "file":
        words.append(f"size {entry.size} ({entry.content})")
    if entry.target:
        words.append(f"-> {abbreviated(entry.target)}")
    if entry.kind in ("chr", "blk"):
        words.append("dev {}:{}".format(*entry.rdev))
    words.append(f"mtime {entry.mtime}")
    if entry.group not in (b"", path):
        words.append(f"same inode as {abbreviated(entry.group)}")
    words += [f"{name}={abbreviated(value)}" for name, value in entry.xattrs]
    return f"{abbreviated(path):24} {' '.join(words)}"


def abbreviated(value: bytes) -> str:
    """Bytes as a Python expression in which nothing is repeated more than a few times."""
    parts = []
    at = 0
    for run in re.finditer(rb"(?s)(.{1,40}?)\1{9,}", value):
        if run.end() - run.start() >= 40:
            parts += [repr(value[at : run.start()])] if run.start() > at else []
            parts.append(f"{run[1]!r} * {len(run[0]) // len(run[1])}")
            at = run.end()
    return " + ".join(parts + ([repr(value[at:])] if at < len(value) or not value else []))


def error_name(error: OSError) -> str:
    """ENOENT and the like."""
    return errno.errorcode.get(error.errno or 0, str(error.errno))
