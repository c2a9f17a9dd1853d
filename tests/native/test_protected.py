"""What chattr(1) has made immutable or append-only: what can be done to it is what the kernel's overlayfs allows,
whichever of the two has set the flags, and nothing on disk keeps an upper layer from being removed."""

import errno
import fcntl
import mmap
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.support.inode_flags import (
    APPEND,
    FS_IOC_FSGETXATTR,
    FS_IOC_FSSETXATTR,
    IMMUTABLE,
    NOATIME,
    SYNC,
    change_flags,
    flags_of,
)
from tests.support.mounts import kernel_mount, our_mount

KINDS = {"immutable": IMMUTABLE, "append-only": APPEND}


def writing(path: Path, flags: int) -> None:
    """Open and write: with io=cached it is the write that is refused."""
    fd = os.open(path, flags)
    try:
        os.write(fd, b"more")
    finally:
        os.close(fd)


def allocating(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        os.posix_fallocate(fd, 0, 100)
    finally:
        os.close(fd)


# What is tried of an object `p`, which is a file or a directory; `m` is the root of the mount.
ATTEMPTS: dict[str, Callable[[Path, Path], object]] = {
    "chmod": lambda p, m: p.chmod(0o700),
    "chown": lambda p, m: os.chown(p, 1, 1),
    "set a time": lambda p, m: os.utime(p, ns=(1, 1)),
    "touch": lambda p, m: os.utime(p),
    "set an xattr": lambda p, m: os.setxattr(p, "user.a", b"b"),
    "remove an xattr": lambda p, m: os.removexattr(p, "user.there"),
    "remove no xattr": lambda p, m: os.removexattr(p, "user.none"),
    "link": lambda p, m: os.link(p, m / "linked"),
    "replace": lambda p, m: os.rename(m / ("otherdir" if p.is_dir() else "other"), p),
    "move": lambda p, m: os.rename(p, m / "moved"),
    "remove": lambda p, m: os.rmdir(p) if p.is_dir() else os.unlink(p),
}
FILE_ATTEMPTS: dict[str, Callable[[Path, Path], object]] = {
    "truncate": lambda p, m: os.truncate(p, 1),
    "allocate": lambda p, m: allocating(p),
    "append": lambda p, m: writing(p, os.O_WRONLY | os.O_APPEND),
    "overwrite": lambda p, m: writing(p, os.O_WRONLY),
    "empty": lambda p, m: os.close(os.open(p, os.O_WRONLY | os.O_TRUNC)),
}
DIRECTORY_ATTEMPTS: dict[str, Callable[[Path, Path], object]] = {
    "make a file": lambda p, m: (p / "new").touch(),
    "make a directory": lambda p, m: (p / "newdir").mkdir(),
    "make a link": lambda p, m: (p / "link").symlink_to("x"),
    "make a fifo": lambda p, m: os.mkfifo(p / "fifo"),
    "make a nameless file": lambda p, m: os.close(os.open(p, os.O_TMPFILE | os.O_RDWR)),
    "link into": lambda p, m: os.link(m / "other", p / "hard"),
    "move into": lambda p, m: os.rename(m / "third", p / "in"),
    "move over": lambda p, m: os.rename(m / "fourth", p / "inner"),
    "move out": lambda p, m: os.rename(p / "out", m / "out"),
    "remove from": lambda p, m: os.unlink(p / "inner"),
    "change within": lambda p, m: (p / "kept").write_bytes(b"changed"),
    "remove": lambda p, m: os.rmdir(p),
}


# pyfuse3 doesn't say that a time is that of now, and has neither O_TMPFILE nor fallocate(2).
UNTOLD = {"touch", "make a nameless file", "allocate"}


def build(place: Path, kind: str) -> None:
    """Fill a directory with what an attempt needs; `p` is what the flags are for."""
    place.mkdir()
    for name in ("other", "third", "fourth"):
        (place / name).write_bytes(b"other")
    (place / "otherdir").mkdir()
    at = place / "p"
    if kind == "file":
        at.write_bytes(b"data")
    else:
        at.mkdir()
        for name in ("inner", "out", "kept"):
            (at / name).write_bytes(b"inner")
    os.setxattr(at, "user.there", b"1")


Mounting = Callable[[Layers], AbstractContextManager[object]]


def ours(options: str) -> Mounting:
    return lambda at: our_mount(at.mnt, [at.lower], at.upper, at.work, options)


def kernels(at: Layers) -> AbstractContextManager[object]:
    return kernel_mount(at.mnt, [at.lower], at.upper, at.work)


def outcomes(layers: Layers, name: str, mounting: Mounting, kind: str, where: str, flag: int) -> dict[str, str]:
    """What came of each attempt: an error's name, or nothing. Afterwards the flags are taken again."""
    at = Layers(*(layers.add(f"{part}-{name}") for part in ("base", "lower", "upper", "work", "mnt")))
    tried = {**ATTEMPTS, **(FILE_ATTEMPTS if kind == "file" else DIRECTORY_ATTEMPTS)}
    layer = at.lower if where == "lower" else at.upper
    for attempt in tried:
        build(layer / attempt, kind)
    found: dict[str, str] = {}
    try:
        if where == "lower":
            for attempt in tried:
                change_flags(layer / attempt / "p", add=flag)
        with mounting(at):
            for attempt, action in tried.items():
                place = at.mnt / attempt
                if where != "lower":
                    change_flags(place / "p", add=flag)
                    assert flags_of(place / "p") & (IMMUTABLE | APPEND) == flag
                try:
                    action(place / "p", place)
                    found[attempt] = ""
                except OSError as error:
                    found[attempt] = errno.errorcode[error.errno or 0]
    finally:
        if where == "lower":
            for attempt in tried:
                change_flags(layer / attempt / "p", take=flag)
    # Nothing there has a flag of its own.
    shutil.rmtree(at.upper)
    return found


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("lower", "engine=native"),
        ("lower", "engine=native,io=passthrough"),
        ("lower", "engine=portable"),
        ("upper", "engine=native"),
        ("upper", "engine=native,io=passthrough"),
    ],
)
@pytest.mark.parametrize("flag", KINDS)
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_protected_is_as_protected_as_the_kernel_has_it(
    layers: Layers, kind: str, flag: str, where: str, options: str
) -> None:
    """In a lower layer, and through the mount, which the portable engine can't do."""
    found = outcomes(layers, "ours", ours(options), kind, where, KINDS[flag])
    wanted = outcomes(layers, "kernel", kernels, kind, where, KINDS[flag])
    if "portable" in options:
        for attempt in UNTOLD & wanted.keys():
            del found[attempt], wanted[attempt]
    assert found == wanted
    assert "EPERM" in found.values()


@pytest.mark.parametrize("order", ["ours first", "the kernel first"])
@pytest.mark.parametrize("engine", ["native", "portable"])
def test_the_flags_are_where_the_kernel_keeps_them(layers: Layers, order: str, engine: str) -> None:
    (layers.lower / "both").write_bytes(b"data")
    (layers.upper / "immutable").write_bytes(b"data")
    (layers.upper / "append-only").mkdir()
    wanted = {"both": IMMUTABLE | APPEND, **KINDS}
    here = ours(f"engine={engine}")
    setting, reading = (ours("engine=native"), kernels) if order == "ours first" else (kernels, here)
    with setting(layers):
        for name, flags in wanted.items():
            change_flags(layers.mnt / name, add=flags)
    assert all(not flags_of(layers.upper / name) & flags for name, flags in wanted.items())
    with reading(layers):
        for name in wanted:
            with pytest.raises(PermissionError):
                os.rename(layers.mnt / name, layers.mnt / "moved")
        if (order, engine) != ("the kernel first", "portable"):
            assert {name: flags_of(layers.mnt / name) & (IMMUTABLE | APPEND) for name in wanted} == wanted
            for name, flags in wanted.items():
                change_flags(layers.mnt / name, take=flags)
                assert not flags_of(layers.mnt / name) & flags
                os.rename(layers.mnt / name, layers.mnt / "moved")
                os.rename(layers.mnt / "moved", layers.mnt / name)
            assert all("trusted.overlay.protattr" not in os.listxattr(layers.upper / name) for name in wanted)


@pytest.mark.parametrize("engine", ["native", "portable"])
def test_a_copy_is_to_be_written_and_read_as_what_it_is_a_copy_of(layers: Layers, engine: str) -> None:
    for name in ("d", "e"):
        (layers.lower / name).mkdir()
        (layers.lower / name / "f").write_bytes(b"data")
    for path in (layers.lower / "d", layers.lower / "d" / "f"):
        change_flags(path, add=SYNC | NOATIME)
    with ours(f"engine={engine}")(layers):
        for name in ("d", "e"):
            (layers.mnt / name / "f").chmod(0o600)
            (layers.mnt / name / "f").write_bytes(b"changed")
    for path in (layers.upper / "d", layers.upper / "d" / "f"):
        assert flags_of(path) & (SYNC | NOATIME) == SYNC | NOATIME
    assert not flags_of(layers.upper / "e" / "f") & (SYNC | NOATIME)


def test_extended_flags_are_the_same_flags(layers: Layers) -> None:
    (layers.upper / "f").write_bytes(b"data")
    with ours("engine=native")(layers):
        fd = os.open(layers.mnt / "f", os.O_RDONLY)
        try:
            before = fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(28))
            flags = struct.unpack_from("I", before)[0]
            for bit, flag in ((0x08, IMMUTABLE), (0x10, APPEND)):
                fcntl.ioctl(fd, FS_IOC_FSSETXATTR, struct.pack("I", flags | bit) + before[4:])
                assert flags_of(layers.mnt / "f") & (IMMUTABLE | APPEND) == flag
                assert struct.unpack_from("I", fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(28)))[0] == flags | bit
                assert not flags_of(layers.upper / "f") & flag
            fcntl.ioctl(fd, FS_IOC_FSSETXATTR, before)
            assert not flags_of(layers.mnt / "f") & (IMMUTABLE | APPEND)
        finally:
            os.close(fd)


def test_a_flag_that_is_on_the_file_itself_counts_and_can_be_taken(layers: Layers) -> None:
    (layers.upper / "f").write_bytes(b"data")
    change_flags(layers.upper / "f", add=IMMUTABLE)
    try:
        with ours("engine=native")(layers):
            assert flags_of(layers.mnt / "f") & IMMUTABLE
            with pytest.raises(PermissionError):
                (layers.mnt / "f").unlink()
            change_flags(layers.mnt / "f", take=IMMUTABLE)
            (layers.mnt / "f").write_bytes(b"other")
    finally:
        change_flags(layers.upper / "f", take=IMMUTABLE)
    assert (layers.upper / "f").read_bytes() == b"other"


def test_what_was_stored_through_a_mapping_before_is_not_lost(layers: Layers) -> None:
    (layers.upper / "f").write_bytes(bytes(8192))
    with ours("engine=native")(layers):
        fd = os.open(layers.mnt / "f", os.O_RDWR)
        with mmap.mmap(fd, 8192) as mapping:
            mapping[:5] = b"hello"
            change_flags(layers.mnt / "f", add=IMMUTABLE)
        os.close(fd)
    assert (layers.upper / "f").read_bytes()[:5] == b"hello"


def test_what_may_only_grow_is_not_written_over_when_its_data_come_after_it(layers: Layers) -> None:
    (layers.lower / "log").write_bytes(b"data")
    with ours("engine=native,metacopy=on")(layers):
        change_flags(layers.mnt / "log", add=APPEND)
        assert "trusted.overlay.metacopy" in os.listxattr(layers.upper / "log")
        for _ in range(2):
            with pytest.raises(PermissionError):
                writing(layers.mnt / "log", os.O_WRONLY)
        writing(layers.mnt / "log", os.O_WRONLY | os.O_APPEND)
        with pytest.raises(PermissionError):
            writing(layers.mnt / "log", os.O_WRONLY)
        assert (layers.mnt / "log").read_bytes() == b"datamore"
