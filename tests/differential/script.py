"""The operations of a script: plain values, each of which runs on a side and returns what a program would see."""

import contextlib
import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar, Final, Protocol

from tests.support.syscalls import UTIME_NOW, UTIME_OMIT, renameat2, utimensat
from tests.support.trees import Stack, abbreviated, clock, error_name

MAY_BLOCK: Final = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(slots=True)
class Handle:
    """An open file of a script."""

    descriptor: int
    flags: int


class Where(Protocol):
    """What an operation needs of the side it runs on."""

    since: int  # nanoseconds; times from here on are "now"
    atimes: bool  # access times are compared
    stale_handles: bool  # a handle opened for reading before a copy-up goes on showing the lower file
    handles: dict[int, Handle]

    def at(self, path: bytes) -> bytes:
        """The absolute path of a path of the script."""

    def would_lose_links(self) -> bool:
        """Whether the kernel would not keep all hard links of the upper layer, were it a lower one."""

    def remount(self) -> None:
        """Unmount and mount again."""

    def rotate(self) -> None:
        """Unmount, make the upper the topmost lower, mount with a new empty upper."""


class Op(Protocol):
    """An operation; `paths` are those whose state it may change."""

    @property
    def paths(self) -> tuple[bytes, ...]: ...

    def run(self, side: Where) -> object:
        """Do it; raises OSError."""


@dataclass(frozen=True, slots=True)
class Step:
    """An operation by user `who` (an index of USERS); with `look`, its paths are examined before and after."""

    op: Op
    who: int = 0
    look: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """What an operation gave: a value, or an errno by name."""

    error: str
    value: object = None

    def __str__(self) -> str:
        return self.error or repr(self.value)


@dataclass(frozen=True, slots=True)
class Script:
    """What a failure is reported as, and can be run again from."""

    profile: str
    stack: Stack
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class User:
    uid: int
    gid: int
    groups: tuple[int, ...]


USERS: Final = (User(0, 0, (0,)), User(1000, 1000, (1000, 2000)), User(1001, 1001, (1001, 2000)))


def content(seed: int, size: int) -> bytes:
    """`size` bytes that depend on `seed`."""
    block = hashlib.sha256(b"%d" % seed).hexdigest().encode()
    return (block * (size // len(block) + 1))[:size]


def brief(data: bytes) -> object:
    """Data as it appears in results: itself when short."""
    return data if len(data) <= 64 else (len(data), hashlib.sha256(data).hexdigest()[:12], data[:16])


def status(side: Where, found: os.stat_result) -> dict[str, object]:
    """The fields of a stat that are the same wherever the layers live."""
    seen: dict[str, object] = {
        "mode": oct(found.st_mode),
        "owner": (found.st_uid, found.st_gid),
        "mtime": clock(found.st_mtime_ns, side.since),
    }
    if side.atimes and not stat.S_ISLNK(found.st_mode):
        seen["atime"] = clock(found.st_atime_ns, side.since)
    if not stat.S_ISDIR(found.st_mode):
        seen["size"] = found.st_size
        seen["nlink"] = found.st_nlink
    if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
        seen["rdev"] = found.st_rdev
    return seen


@contextlib.contextmanager
def opened(side: Where, path: bytes, flags: int, mode: int = 0o600) -> Iterator[int]:
    descriptor = os.open(side.at(path), flags | MAY_BLOCK, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@dataclass(frozen=True, slots=True)
class OnePath:
    path: bytes

    @property
    def paths(self) -> tuple[bytes, ...]:
        return (self.path,)


@dataclass(frozen=True, slots=True)
class TwoPaths:
    old: bytes
    new: bytes

    @property
    def paths(self) -> tuple[bytes, ...]:
        return (self.old, self.new)


@dataclass(frozen=True, slots=True)
class OneSlot:
    slot: int
    paths: ClassVar[tuple[bytes, ...]] = ()


@dataclass(frozen=True, slots=True)
class NoPath:
    paths: ClassVar[tuple[bytes, ...]] = ()


@dataclass(frozen=True, slots=True)
class Create(OnePath):
    mode: int = 0o644
    mask: int = 0o022
    seed: int = 0
    size: int = 0

    def run(self, side: Where) -> object:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with umask(self.mask), opened(side, self.path, flags, self.mode) as descriptor:
            os.write(descriptor, content(self.seed, self.size))
            return status(side, os.fstat(descriptor))


@dataclass(frozen=True, slots=True)
class Write(OnePath):
    """Open, write at an offset (at the end with O_APPEND), close."""

    offset: int = 0
    size: int = 10
    seed: int = 1
    flags: int = 0

    def run(self, side: Where) -> object:
        with umask(0o022), opened(side, self.path, os.O_WRONLY | self.flags, 0o644) as descriptor:
            if self.flags & os.O_APPEND:
                return os.write(descriptor, content(self.seed, self.size))
            return os.pwrite(descriptor, content(self.seed, self.size), self.offset)


@dataclass(frozen=True, slots=True)
class MapWrite(OnePath):
    """Change bytes of the first page through a shared mapping."""

    seed: int = 2

    def run(self, side: Where) -> object:
        with opened(side, self.path, os.O_RDWR) as descriptor:
            size = min(os.fstat(descriptor).st_size, 4096)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not size:
                return "nothing to map"
            with mmap.mmap(descriptor, size) as mapping:
                mapping[size // 2 : size] = content(self.seed, size - size // 2)
                mapping.flush()
                return size


@dataclass(frozen=True, slots=True)
class Truncate(OnePath):
    size: int = 0

    def run(self, side: Where) -> None:
        os.truncate(side.at(self.path), self.size)


@dataclass(frozen=True, slots=True)
class Read(OnePath):
    offset: int = 0
    size: int = 1 << 20

    def run(self, side: Where) -> object:
        with opened(side, self.path, os.O_RDONLY) as descriptor:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return brief(os.pread(descriptor, self.size, self.offset))
            return "not a file"


@dataclass(frozen=True, slots=True)
class Copy(TwoPaths):
    """copy_file_range(2) of a whole file into an existing one."""

    def run(self, side: Where) -> object:
        with opened(side, self.old, os.O_RDONLY) as source, opened(side, self.new, os.O_WRONLY) as target:
            count = os.copy_file_range(source, target, 1 << 20)
            return count, brief(os.pread(source, 1 << 20, 0))


@dataclass(frozen=True, slots=True)
class Mkdir(OnePath):
    mode: int = 0o755
    mask: int = 0o022

    def run(self, side: Where) -> None:
        with umask(self.mask):
            os.mkdir(side.at(self.path), self.mode)


@dataclass(frozen=True, slots=True)
class Rmdir(OnePath):
    def run(self, side: Where) -> None:
        os.rmdir(side.at(self.path))


@dataclass(frozen=True, slots=True)
class Unlink(OnePath):
    def run(self, side: Where) -> None:
        os.unlink(side.at(self.path))


@dataclass(frozen=True, slots=True)
class Rename(TwoPaths):
    flags: int = 0

    def run(self, side: Where) -> None:
        renameat2(side.at(self.old), side.at(self.new), self.flags)


@dataclass(frozen=True, slots=True)
class Link(TwoPaths):
    def run(self, side: Where) -> None:
        os.link(side.at(self.old), side.at(self.new), follow_symlinks=False)


@dataclass(frozen=True, slots=True)
class Symlink(OnePath):
    target: bytes = b"a"

    def run(self, side: Where) -> None:
        os.symlink(self.target, side.at(self.path))


@dataclass(frozen=True, slots=True)
class Readlink(OnePath):
    def run(self, side: Where) -> object:
        return os.readlink(side.at(self.path))


@dataclass(frozen=True, slots=True)
class Mknod(OnePath):
    mode: int = stat.S_IFIFO | 0o644
    rdev: tuple[int, int] = (0, 0)
    mask: int = 0o022

    def run(self, side: Where) -> None:
        with umask(self.mask):
            os.mknod(side.at(self.path), self.mode, os.makedev(*self.rdev))


@dataclass(frozen=True, slots=True)
class Chmod(OnePath):
    mode: int = 0o600

    def run(self, side: Where) -> None:
        os.chmod(side.at(self.path), self.mode)


@dataclass(frozen=True, slots=True)
class Chown(OnePath):
    uid: int = -1
    gid: int = -1
    follow: bool = False

    def run(self, side: Where) -> None:
        os.chown(side.at(self.path), self.uid, self.gid, follow_symlinks=self.follow)


@dataclass(frozen=True, slots=True)
class Utimens(OnePath):
    atime: int = UTIME_OMIT
    mtime: int = UTIME_NOW
    follow: bool = False

    def run(self, side: Where) -> None:
        utimensat(side.at(self.path), self.atime, self.mtime, follow=self.follow)


@dataclass(frozen=True, slots=True)
class SetXattr(OnePath):
    name: str = "user.a"
    value: bytes = b"1"
    flags: int = 0
    follow: bool = False

    def run(self, side: Where) -> None:
        os.setxattr(side.at(self.path), self.name, self.value, self.flags, follow_symlinks=self.follow)


@dataclass(frozen=True, slots=True)
class GetXattr(OnePath):
    name: str = "user.a"

    def run(self, side: Where) -> object:
        return os.getxattr(side.at(self.path), self.name, follow_symlinks=False)


@dataclass(frozen=True, slots=True)
class RemoveXattr(OnePath):
    name: str = "user.a"

    def run(self, side: Where) -> None:
        os.removexattr(side.at(self.path), self.name, follow_symlinks=False)


@dataclass(frozen=True, slots=True)
class ListXattr(OnePath):
    def run(self, side: Where) -> object:
        return sorted(os.listxattr(side.at(self.path), follow_symlinks=False))


@dataclass(frozen=True, slots=True)
class Readdir(OnePath):
    """Names with the types the listing itself gives."""

    def run(self, side: Where) -> object:
        with os.scandir(side.at(self.path)) as entries:
            return sorted((entry.name, _listed_kind(entry)) for entry in entries)


def _listed_kind(entry: os.DirEntry[bytes]) -> str:
    if entry.is_symlink():
        return "symlink"
    return "dir" if entry.is_dir(follow_symlinks=False) else "file" if entry.is_file(follow_symlinks=False) else "other"


@dataclass(frozen=True, slots=True)
class Stat(OnePath):
    follow: bool = False

    def run(self, side: Where) -> object:
        return status(side, os.stat(side.at(self.path), follow_symlinks=self.follow))


@dataclass(frozen=True, slots=True)
class Access(OnePath):
    mode: int = os.R_OK

    def run(self, side: Where) -> object:
        return os.access(side.at(self.path), self.mode, effective_ids=True)


@dataclass(frozen=True, slots=True)
class Statfs(OnePath):
    def run(self, side: Where) -> object:
        found = os.statvfs(side.at(self.path))
        return found.f_bsize, found.f_frsize, found.f_namemax, found.f_blocks, found.f_files


@dataclass(frozen=True, slots=True)
class Open(OneSlot):
    """Open a file and keep it open; a slot already in use is closed first."""

    path: bytes = b""
    flags: int = os.O_RDONLY
    mode: int = 0o644

    def run(self, side: Where) -> object:
        if self.slot in side.handles:
            os.close(side.handles.pop(self.slot).descriptor)
        with umask(0o022):
            descriptor = os.open(side.at(self.path), self.flags | MAY_BLOCK, self.mode)
        side.handles[self.slot] = Handle(descriptor, self.flags)
        return status(side, os.fstat(descriptor))


@dataclass(frozen=True, slots=True)
class HandleRead(OneSlot):
    """Read through a held handle.

    The kernel's overlayfs goes on serving the lower file through a handle opened before its copy-up. Opening
    /proc/self/fd/N again asks the overlay for the current data, which is what POSIX wants of the old handle.
    """

    offset: int = 0
    size: int = 1 << 20

    def run(self, side: Where) -> object:
        handle = _held(side, self.slot)
        if not stat.S_ISREG(os.fstat(handle.descriptor).st_mode):
            return "not a file"
        if handle.flags & os.O_ACCMODE != os.O_RDONLY or not side.stale_handles:
            return brief(os.pread(handle.descriptor, self.size, self.offset))
        again = os.open(b"/proc/self/fd/%d" % handle.descriptor, os.O_RDONLY)
        try:
            return brief(os.pread(again, self.size, self.offset))
        finally:
            os.close(again)


@dataclass(frozen=True, slots=True)
class HandleWrite(OneSlot):
    offset: int = 0
    size: int = 10
    seed: int = 3

    def run(self, side: Where) -> object:
        handle = _held(side, self.slot)
        if handle.flags & os.O_APPEND:
            return os.write(handle.descriptor, content(self.seed, self.size))
        return os.pwrite(handle.descriptor, content(self.seed, self.size), self.offset)


@dataclass(frozen=True, slots=True)
class HandleTruncate(OneSlot):
    size: int = 0

    def run(self, side: Where) -> None:
        handle = _held(side, self.slot)
        os.ftruncate(handle.descriptor, self.size)


@dataclass(frozen=True, slots=True)
class HandleStat(OneSlot):
    def run(self, side: Where) -> object:
        handle = _held(side, self.slot)
        return status(side, os.fstat(handle.descriptor))


@dataclass(frozen=True, slots=True)
class HandleChmod(OneSlot):
    mode: int = 0o640

    def run(self, side: Where) -> None:
        handle = _held(side, self.slot)
        os.fchmod(handle.descriptor, self.mode)


@dataclass(frozen=True, slots=True)
class HandleSetXattr(OneSlot):
    name: str = "user.a"
    value: bytes = b"held"

    def run(self, side: Where) -> None:
        handle = _held(side, self.slot)
        os.setxattr(handle.descriptor, self.name, self.value)


@dataclass(frozen=True, slots=True)
class HandleSync(OneSlot):
    data_only: bool = False

    def run(self, side: Where) -> None:
        handle = _held(side, self.slot)
        (os.fdatasync if self.data_only else os.fsync)(handle.descriptor)


@dataclass(frozen=True, slots=True)
class HandleLink(OneSlot):
    """Give the open file a name, as linkat(2) does with /proc/self/fd/N."""

    path: bytes = b""

    def run(self, side: Where) -> None:
        handle = _held(side, self.slot)
        os.link(b"/proc/self/fd/%d" % handle.descriptor, side.at(self.path), follow_symlinks=True)


@dataclass(frozen=True, slots=True)
class HandleList(OneSlot):
    """List a directory that is held open."""

    def run(self, side: Where) -> object:
        handle = _held(side, self.slot)
        return sorted(os.fsencode(name) for name in os.listdir(handle.descriptor))


@dataclass(frozen=True, slots=True)
class Close(OneSlot):
    def run(self, side: Where) -> None:
        handle = _held(side, self.slot)
        del side.handles[self.slot]
        os.close(handle.descriptor)


def _held(side: Where, slot: int) -> Handle:
    if slot not in side.handles:
        raise OSError(errno.EBADF, "the slot is empty")
    return side.handles[slot]


@dataclass(frozen=True, slots=True)
class Remount(NoPath):
    """Inode numbers must be the same afterwards."""

    def run(self, side: Where) -> object:
        before = inode_numbers(side.at(b""))
        side.remount()
        after = inode_numbers(side.at(b""))
        return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


@dataclass(frozen=True, slots=True)
class Rotate(NoPath):
    def run(self, side: Where) -> None:
        side.rotate()


def inode_numbers(root: bytes) -> dict[bytes, int | str]:
    """The inode number of each path, or the error that asking for it gave."""
    numbers: dict[bytes, int | str] = {}
    directories = [root]
    while directories:
        directory = directories.pop()
        try:
            names = sorted(os.listdir(directory))
        except OSError as error:
            numbers[directory[len(root) :] + b"/*"] = error_name(error)
            continue
        for name in names:
            path = os.path.join(directory, name)
            try:
                found = os.lstat(path)
            except OSError as error:
                numbers[path[len(root) :]] = error_name(error)
                continue
            numbers[path[len(root) :]] = found.st_ino
            if stat.S_ISDIR(found.st_mode):
                directories.append(path)
    return numbers


SCRIPT: Final = "--- script ---\n"


def show(script: Script) -> str:
    """A script as Python text, for `python -m tests.differential replay`."""
    layers = ""
    for layer in script.stack:
        layers += "    (\n" + "".join(f"        {written(node)},\n" for node in layer) + "    ),\n"
    steps = "".join(f"    {written(step)},\n" for step in script.steps)
    return f"profile = {script.profile!r}\nstack = (\n{layers})\nsteps = (\n{steps})\n"


def written(value: object) -> str:
    """A value as Python text, short: without fields that have their default, long runs of bytes as products."""
    if is_dataclass(value) and not isinstance(value, type):
        told = [field for field in fields(value) if getattr(value, field.name) != field.default]
        return f"{type(value).__name__}({', '.join(f'{f.name}={written(getattr(value, f.name))}' for f in told)})"
    if isinstance(value, tuple):
        return "(" + "".join(f"{written(item)}, " for item in value).rstrip() + ")"
    if isinstance(value, bytes):
        return abbreviated(value)
    return repr(value)


def load(text: str) -> Script:
    """The script that `show` wrote, alone or at the end of a report."""
    from tests.support import trees

    names: dict[str, object] = {**vars(trees), **globals()}
    exec(text.rpartition(SCRIPT)[2], names)
    stack, steps = names["stack"], names["steps"]
    assert isinstance(stack, tuple) and isinstance(steps, tuple)
    return Script(str(names["profile"]), stack, steps)
