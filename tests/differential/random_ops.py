"""Operations chosen at random, guided by what exists, so that most of them do something."""

import os
import random
import stat
from collections.abc import Callable
from typing import Final

from tests.differential.script import (
    Access,
    Chmod,
    Chown,
    Close,
    Copy,
    Create,
    GetXattr,
    HandleChmod,
    HandleLink,
    HandleList,
    HandleRead,
    HandleSetXattr,
    HandleStat,
    HandleSync,
    HandleTruncate,
    HandleWrite,
    Link,
    ListXattr,
    MapWrite,
    Mkdir,
    Mknod,
    Op,
    Open,
    Read,
    Readdir,
    Readlink,
    Remount,
    RemoveXattr,
    Rename,
    Rmdir,
    Rotate,
    SetXattr,
    Stat,
    Statfs,
    Step,
    Symlink,
    Truncate,
    Unlink,
    Utimens,
    Write,
)
from tests.differential.side import Side
from tests.differential.stacks import ACLS, CAPABILITY, NAMES, TARGETS
from tests.support.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, UTIME_NOW, UTIME_OMIT

SLOTS: Final = 4
_MODES: Final = (0o644, 0o600, 0o755, 0o666, 0o777, 0o700, 0o4755, 0o2755, 0o2644, 0o1777, 0o6777, 0o000, 0o2775)
_MASKS: Final = (0o022, 0o022, 0o000, 0o077, 0o002)
_OWNERS: Final = (-1, -1, 0, 1000, 1001)
_GROUPS: Final = (-1, -1, 0, 1000, 2000)
_SIZES: Final = (0, 1, 10, 4096, 5000, 70_000, 200_000)
_TIMES: Final = (
    UTIME_NOW,
    UTIME_OMIT,
    1_000_000_001,
    1_500_000_000_987_654_321,
    4_102_444_800_000_000_007,
    -1_000_000_000,
)
_XATTRS: Final = (
    "user.a",
    "user.b",
    "trusted.t",
    "security.s",
    "trusted.overlay.opaque",
    "trusted.overlay.other",
    "trusted.overlay.overlay.opaque",
    "user.overlay.opaque",
    "user.overlay.other",
    "user.overlay.overlay.x",
    "user.",
    "user",
    "nonsense.x",
    "system.nothing",
)
_VALUES: Final = (b"1", b"", b"other", b"y", b"v" * 1000)
_OPEN_FLAGS: Final = (
    os.O_RDONLY,
    os.O_RDONLY,
    os.O_RDWR,
    os.O_WRONLY,
    os.O_RDWR | os.O_CREAT,
    os.O_WRONLY | os.O_APPEND,
    os.O_RDWR | os.O_TRUNC,
    os.O_RDONLY | os.O_DIRECTORY,
    os.O_RDWR | os.O_CREAT | os.O_EXCL,
    os.O_RDONLY | os.O_NOFOLLOW,
    os.O_RDONLY | os.O_TRUNC,
)


class World:
    """What exists on one side, as far as choosing the next operation needs it."""

    def __init__(self, side: Side) -> None:
        self.root = side.mnt
        self.handles = side.handles
        self.entries: list[tuple[bytes, str]] = []
        self.directories: list[bytes] = [b""]

    def look(self) -> None:
        self.entries = []
        self.directories = [b""]
        waiting = [b""]
        while waiting:
            directory = waiting.pop()
            try:
                with os.scandir(self.root + b"/" + directory) as found:
                    listed = sorted(
                        (entry.name, entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in found
                    )
            except OSError:
                # A stack may hold a directory that neither side can list; the operations will tell whether both say so.
                continue
            for name, is_dir, is_symlink in listed:
                path = (directory + b"/" if directory else b"") + name
                self.entries.append((path, "dir" if is_dir else "symlink" if is_symlink else "file"))
                if is_dir:
                    self.directories.append(path)
                    waiting.append(path)


def _any(source: random.Random, world: World, *kinds: str) -> bytes:
    """Mostly something that exists, of one of `kinds` if given."""
    if not source.randrange(12):
        return _fresh(source, world)
    wanted = [path for path, kind in world.entries if not kinds or kind in kinds]
    if not wanted:
        return _fresh(source, world)
    path = source.choice(wanted)
    odd = source.randrange(40)
    return path + b"/" if odd == 39 else path + b"/x" if odd == 38 else path


def _fresh(source: random.Random, world: World) -> bytes:
    """A name in an existing directory, not too deep; it may exist."""
    shallow = [path for path in world.directories if path.count(b"/") < 5]
    directory = source.choice(shallow)
    odd = source.randrange(40)
    name = b"n" * 256 if odd == 39 else source.choice(NAMES) if odd > 25 else source.choice(NAMES[:5])
    return (directory + b"/" if directory else b"") + name + (b"/" if odd == 37 else b"")


def _create(source: random.Random, world: World) -> Op:
    size = source.choice(_SIZES[:5])
    return Create(_fresh(source, world), source.choice(_MODES), source.choice(_MASKS), source.randrange(100), size)


def _write(source: random.Random, world: World) -> Op:
    flags = source.choice((0, 0, 0, os.O_APPEND, os.O_TRUNC, os.O_CREAT))
    path = _any(source, world, "file", "symlink")
    return Write(path, source.choice(_SIZES), source.choice(_SIZES[1:]), source.randrange(100), flags)


def _copy(source: random.Random, world: World) -> Op:
    return Copy(_any(source, world, "file"), _any(source, world, "file"))


def _rename(source: random.Random, world: World) -> Op:
    flags = source.choice((0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE))
    onto = flags == RENAME_EXCHANGE or not source.randrange(3)
    return Rename(_any(source, world), _any(source, world) if onto else _fresh(source, world), flags)


def _rename_dir(source: random.Random, world: World) -> Op:
    flags = source.choice((0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE))
    onto = flags == RENAME_EXCHANGE or not source.randrange(3)
    return Rename(_any(source, world, "dir"), _any(source, world, "dir") if onto else _fresh(source, world), flags)


def _rmdir(source: random.Random, world: World) -> Op:
    full = {os.path.dirname(path) for path, _ in world.entries}
    empty = [path for path in world.directories if path and path not in full]
    return Rmdir(source.choice(empty) if empty and source.randrange(3) else _any(source, world, "dir"))


def _mknod(source: random.Random, world: World) -> Op:
    kind, rdev = source.choice(
        (
            (stat.S_IFIFO, (0, 0)),
            (stat.S_IFSOCK, (0, 0)),
            (stat.S_IFREG, (0, 0)),
            (stat.S_IFCHR, (1, 3)),
            (stat.S_IFBLK, (7, 200)),
            (stat.S_IFCHR, (0, 0)),
        )
    )
    return Mknod(_fresh(source, world), kind | source.choice(_MODES), rdev, source.choice(_MASKS))


def _chown(source: random.Random, world: World) -> Op:
    follow = bool(source.randrange(2))
    return Chown(_any(source, world), source.choice(_OWNERS), source.choice(_GROUPS), follow)


def _utimens(source: random.Random, world: World) -> Op:
    return Utimens(_any(source, world), source.choice(_TIMES), source.choice(_TIMES), bool(source.randrange(2)))


def _set_xattr(source: random.Random, world: World) -> Op:
    path, follow = _any(source, world), bool(source.randrange(2))
    flags = source.choice((0, 0, os.XATTR_CREATE, os.XATTR_REPLACE))
    if not source.randrange(8):
        return SetXattr(path, *CAPABILITY, flags, follow)
    return SetXattr(path, source.choice(_XATTRS), source.choice(_VALUES), flags, follow)


def _set_acl(source: random.Random, world: World) -> Op:
    name, value = source.choice(tuple(ACLS.values()))
    return SetXattr(_any(source, world, "file", "dir"), name, value, 0, True)


def _remove_xattr(source: random.Random, world: World) -> Op:
    names = (*_XATTRS[:6], *(name for name, _ in ACLS.values()), CAPABILITY[0])
    return RemoveXattr(_any(source, world), source.choice(names))


def _open(source: random.Random, world: World) -> Op:
    flags = source.choice(_OPEN_FLAGS)
    path = _fresh(source, world) if flags & os.O_EXCL else _any(source, world)
    return Open(source.randrange(SLOTS), path, flags, source.choice(_MODES))


def _handle(source: random.Random, world: World) -> Op:
    if not world.handles:
        return _open(source, world)
    slot = source.choice(sorted(world.handles))
    offset, size = source.choice(_SIZES), source.choice(_SIZES[1:])
    match source.randrange(9):
        case 0:
            return HandleTruncate(slot, size)
        case 1:
            return HandleStat(slot)
        case 2:
            return HandleChmod(slot, source.choice(_MODES))
        case 3:
            return HandleSetXattr(slot)
        case 4:
            return HandleSync(slot, bool(source.randrange(2)))
        case 5:
            return HandleLink(slot, _fresh(source, world))
        case 6:
            return HandleList(slot)
        case 7:
            return HandleRead(slot, source.choice((0, 0, 3, 4096)))
        case _:
            return HandleWrite(slot, offset, size, source.randrange(100))


Maker = Callable[[random.Random, World], Op]

# How often each is chosen, relative to the others, and how it is made.
MAKERS: Final[dict[str, tuple[int, Maker]]] = {
    "create": (6, _create),
    "write": (6, _write),
    "map_write": (1, lambda s, w: MapWrite(_any(s, w, "file"), s.randrange(100))),
    "truncate": (3, lambda s, w: Truncate(_any(s, w, "file", "symlink"), s.choice(_SIZES))),
    "read": (3, lambda s, w: Read(_any(s, w), s.choice((0, 0, 5, 4096, 300_000)))),
    "copy": (1, _copy),
    "mkdir": (4, lambda s, w: Mkdir(_fresh(s, w), s.choice(_MODES), s.choice(_MASKS))),
    "rmdir": (3, _rmdir),
    "unlink": (5, lambda s, w: Unlink(_any(s, w))),
    "rename": (8, _rename),
    "rename_dir": (5, _rename_dir),
    "link": (5, lambda s, w: Link(_any(s, w, *("file", "symlink")[: s.randrange(3)]), _fresh(s, w))),
    "symlink": (2, lambda s, w: Symlink(_fresh(s, w), s.choice(TARGETS))),
    "readlink": (1, lambda s, w: Readlink(_any(s, w, "symlink"))),
    "mknod": (2, _mknod),
    "chmod": (4, lambda s, w: Chmod(_any(s, w), s.choice(_MODES))),
    "chown": (3, _chown),
    "utimens": (3, _utimens),
    "set_xattr": (4, _set_xattr),
    "set_acl": (2, _set_acl),
    "get_xattr": (1, lambda s, w: GetXattr(_any(s, w), s.choice(_XATTRS))),
    "remove_xattr": (2, _remove_xattr),
    "list_xattr": (1, lambda s, w: ListXattr(_any(s, w))),
    "readdir": (3, lambda s, w: Readdir(_any(s, w, "dir"))),
    "stat": (2, lambda s, w: Stat(_any(s, w), bool(s.randrange(2)))),
    "access": (1, lambda s, w: Access(_any(s, w), s.choice((os.F_OK, os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.W_OK)))),
    "statfs": (1, lambda s, w: Statfs(_any(s, w, "dir"))),
    "open": (5, _open),
    "handle": (10, _handle),
    "close": (2, lambda s, w: Close(s.randrange(SLOTS))),
    "remount": (1, lambda s, w: Remount()),
    "rotate": (1, lambda s, w: Rotate()),
}


def random_step(source: random.Random, world: World, kind: str) -> Step:
    """A step of a kind of MAKERS, mostly by root, and mostly examined before and after."""
    op = MAKERS[kind][1](source, world)
    who = 0 if isinstance(op, Remount | Rotate | HandleRead) else source.choice((0, 0, 0, 0, 0, 0, 1, 1, 2))
    return Step(op, who, look=bool(source.randrange(4)))


def first_step(source: random.Random) -> Step:
    """Mostly lets everyone write to the root."""
    return Step(Chmod(b"", source.choice((0o777, 0o777, 0o777, 0o1777, 0o755))))
