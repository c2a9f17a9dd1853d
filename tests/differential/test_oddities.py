"""What scripts lack: sizes, times, names, depths and devices at their limits, compared with the kernel's overlayfs."""

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import Layers
from tests.support.mounts import kernel_mount, our_mount
from tests.support.syscalls import mount, umount

TIMES: Final = (-(2**31), -1, 2**31, 2**33, 2**34 - 1, 2**40)
FAR: Final = 5 << 30
FS_IOC_SETFLAGS: Final = 0x40086602
IMMUTABLE: Final = 0x10
SECOND: Final = 10**9


def build(lower: Path) -> None:
    (lower / "f").write_bytes(b"data")
    with (lower / "sparse").open("wb") as file:
        for offset, data in ((1 << 20, b"middle"), (FAR, b"end")):
            file.seek(offset)
            file.write(data)
    for number, seconds in enumerate(TIMES):
        (lower / f"t{number}").touch()
        os.utime(lower / f"t{number}", ns=(seconds * SECOND + 1, seconds * SECOND + 2))
    os.mknod(lower / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(lower / "block", 0o600 | stat.S_IFBLK, os.makedev(259, 1 << 10))
    (lower / ("n" * 255)).write_bytes(b"longest")
    (lower / "link").symlink_to("x" * 4000)
    (lower / "many").mkdir()
    for number in range(2000):
        (lower / "many" / f"x{number:04}").touch()
    (lower / "over").mkdir()
    (lower / "over" / "below").touch()


def sparse(mnt: Path) -> object:
    with (mnt / "sparse").open("r+b") as file:
        file.write(b"start")
        file.flush()
        os.fsync(file.fileno())
        st = os.fstat(file.fileno())
        found = [os.pread(file.fileno(), 6, offset) for offset in (0, 1 << 20, FAR)]
        return st.st_size, st.st_blocks < 10_000, found


def too_large(mnt: Path) -> None:
    os.truncate(mnt / "f", 1 << 45)


def times(mnt: Path, number: int) -> object:
    path = mnt / f"t{number}"
    before = path.stat().st_mtime_ns
    path.chmod(0o600)
    os.link(path, mnt / f"linked{number}")
    return before, path.stat().st_mtime_ns


def set_time(mnt: Path, seconds: int) -> object:
    os.utime(mnt / "f", ns=(seconds * SECOND + 5, seconds * SECOND + 6))
    return (mnt / "f").stat().st_mtime_ns


def device(mnt: Path, name: str) -> object:
    (mnt / name).chmod(0o666)
    st = (mnt / name).stat()
    return st.st_rdev, stat.filemode(st.st_mode)


def use_device(mnt: Path) -> object:
    with (mnt / "null").open("r+b", buffering=0) as file:
        return file.write(b"gone"), file.read(1)


def make_device(mnt: Path) -> object:
    os.mknod(mnt / "made", 0o600 | stat.S_IFBLK, os.makedev(4095, (1 << 20) - 1))
    return (mnt / "made").stat().st_rdev


def longest_name(mnt: Path) -> object:
    os.rename(mnt / ("n" * 255), mnt / ("m" * 255))
    return (mnt / ("m" * 255)).read_bytes(), (mnt / ("n" * 255)).exists()


def long_link(mnt: Path) -> object:
    os.chown(mnt / "link", 1, 1, follow_symlinks=False)
    (mnt / "longest").symlink_to("y" * 4095)
    return len(os.readlink(mnt / "link")), len(os.readlink(mnt / "longest"))


def set_xattr(mnt: Path, name: str, size: int) -> object:
    os.setxattr(mnt / "f", name, b"v" * size)
    return len(os.getxattr(mnt / "f", name))


def deep(mnt: Path) -> object:
    """Far below what a path can say."""
    with contextlib.ExitStack() as opened:

        def enter(name: str, dir_fd: int | None) -> int:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=dir_fd)
            opened.callback(os.close, fd)
            return fd

        at = enter(os.fspath(mnt), None)
        for _ in range(60):
            os.mkdir("p" * 100, dir_fd=at)
            at = enter("p" * 100, at)
        fd = os.open("leaf", os.O_WRONLY | os.O_CREAT, dir_fd=at)
        os.write(fd, b"leaf")
        os.close(fd)
        os.rename("leaf", "renamed", src_dir_fd=at, dst_dir_fd=at)
        os.link("renamed", "linked", src_dir_fd=at, dst_dir_fd=at)
        os.setxattr(f"/proc/self/fd/{at}/renamed", "user.key", b"value")
        os.unlink("linked", dir_fd=at)
        st = os.stat("renamed", dir_fd=at)
        return os.listdir(at), st.st_size, st.st_nlink


def listing_under_change(mnt: Path) -> object:
    """What stays while a directory is read is seen once."""
    seen: list[str] = []
    stays = {f"x{number:04}" for number in range(2000) if number % 3}
    with os.scandir(mnt / "many") as entries:
        for entry in entries:
            seen.append(entry.name)
            if len(seen) == 50:
                for number in range(0, 2000, 3):
                    (mnt / "many" / f"x{number:04}").unlink()
                for number in range(300):
                    (mnt / "many" / f"new{number}").touch()
    found = [name for name in seen if name in stays]
    return len(found) == len(stays), set(found) == stays, len(os.listdir(mnt / "many"))


def mapped(mnt: Path) -> object:
    """A mapping of a lower file that is cut and grows again while it is copied up."""
    with (mnt / "sparse").open("r+b") as file, mmap.mmap(file.fileno(), 8192) as pages:
        os.ftruncate(file.fileno(), 4096)
        pages[0:2] = b"ZZ"
        os.ftruncate(file.fileno(), 8192)
        pages.flush()
        file.seek(0)
        return file.read(3), bytes(pages[4096:8192]) == bytes(4096)


def immutable_directory(mnt: Path) -> object:
    directory = mnt / "kept"
    directory.mkdir()
    (directory / "a").touch()
    results = []
    set_flags(directory, IMMUTABLE)
    actions: tuple[Callable[[], object], ...] = (
        (directory / "b").touch,
        (directory / "c").mkdir,
        (directory / "a").unlink,
        lambda: (directory / "a").write_bytes(b"changed"),
        lambda: os.rename(directory, mnt / "moved"),
        lambda: os.link(mnt / "f", directory / "f"),
        directory.rmdir,
    )
    for action in actions:
        results.append(outcome(action))
    set_flags(directory, 0)
    return results


def set_flags(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=Q", flags))
    finally:
        os.close(fd)


def below_a_mount(mnt: Path) -> object:
    return os.listdir(mnt / "over")


ODDITIES: Final[dict[str, Callable[[Path], object]]] = {
    "sparse": sparse,
    "mapped": mapped,
    "too-large": too_large,
    **{f"times-{seconds}": lambda mnt, number=number: times(mnt, number) for number, seconds in enumerate(TIMES)},  # type: ignore[misc]
    **{f"set-{seconds}": lambda mnt, seconds=seconds: set_time(mnt, seconds) for seconds in TIMES},  # type: ignore[misc]
    "null": lambda mnt: device(mnt, "null"),
    "block": lambda mnt: device(mnt, "block"),
    "use-device": use_device,
    "make-device": make_device,
    "name-255": longest_name,
    "name-256": lambda mnt: (mnt / ("o" * 256)).touch(),
    "link": long_link,
    "link-4096": lambda mnt: (mnt / "longer").symlink_to("y" * 4096),
    "xattr-64k": lambda mnt: set_xattr(mnt, "user.large", 65536),
    "xattr-beyond": lambda mnt: set_xattr(mnt, "user.large", 65537),
    "xattr-name-255": lambda mnt: set_xattr(mnt, "user." + "n" * 250, 1),
    "xattr-name-256": lambda mnt: set_xattr(mnt, "user." + "n" * 251, 1),
    "xattr-unnamed": lambda mnt: set_xattr(mnt, "user.", 1),
    "xattr-of-nothing": lambda mnt: set_xattr(mnt, "nothing.key", 1),
    "deep": deep,
    "listing": listing_under_change,
    "immutable": immutable_directory,
    "mount": below_a_mount,
}


def outcome(action: Callable[[], object]) -> object:
    try:
        return action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


@pytest.mark.parametrize("engine", ["native", "native,io=passthrough", "portable"])
def test_what_is_at_its_limits_ends_as_in_the_kernels_overlayfs(layers: Layers, engine: str) -> None:
    build(layers.lower)
    # What is mounted in a layer is none of it.
    mount(b"tmpfs", os.fsencode(layers.lower / "over"), b"tmpfs")
    other = Layers(layers.base, layers.lower, *(layers.add(f"kernels-{name}") for name in ("upper", "work", "mnt")))
    try:
        with (
            kernel_mount(other.mnt, [other.lower], other.upper, other.work, "redirect_dir=on,index=on"),
            our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, f"engine={engine}"),
        ):
            for name, oddity in ODDITIES.items():
                if engine == "portable" and name == "immutable":
                    # It has no ioctl: a known difference.
                    continue
                theirs, ours = (outcome(lambda one=one: oddity(one.mnt)) for one in (other, layers))  # type: ignore[misc]  # noqa: B023
                assert ours == theirs, name
    finally:
        umount(os.fsencode(layers.lower / "over"))
