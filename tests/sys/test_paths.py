"""Opening below a root."""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator

import pytest

from overlayfs_py.sys import paths
from tests.sys.conftest import Place


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    """Each test closes what it opens, so what is open afterwards was leaked by the code."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


def identity(fd: int) -> tuple[int, int]:
    """The device and inode of what fd refers to; closes it."""
    found = os.fstat(fd)
    os.close(fd)
    return found.st_dev, found.st_ino


def lstat(place: Place, name: str) -> tuple[int, int]:
    found = os.lstat(place.path / name)
    return found.st_dev, found.st_ino


def make_deep(place: Place, length: int) -> bytes:
    """Make directories until their path has that many bytes; the path."""
    names: list[bytes] = []
    fd = os.dup(place.fd)
    while sum(map(len, names)) + len(names) < length:
        names.append(b"%03d-" % len(names) + b"d" * 190)
        os.mkdir(names[-1], dir_fd=fd)
        next_fd = paths.open_dir_at(fd, names[-1])
        os.close(fd)
        fd = next_fd
    os.mknod(b"file", dir_fd=fd)
    os.symlink(b".", b"link", dir_fd=fd)
    os.mkdir(b"last", dir_fd=fd)
    os.close(fd)
    return b"/".join(names)


def test_open_beneath_opens_what_lies_below(place: Place) -> None:
    (place.path / "a/b").mkdir(parents=True)
    (place.path / "a/b/file").write_bytes(b"content")
    fd = paths.open_beneath(place.fd, b"a/b/file", os.O_RDONLY)
    assert os.read(fd, 99) == b"content"
    assert not os.get_inheritable(fd)
    os.close(fd)


@pytest.mark.parametrize("path", [b"", b"."])
def test_open_beneath_of_nothing_is_the_root_itself(place: Place, path: bytes) -> None:
    assert identity(paths.open_beneath(place.fd, path, os.O_RDONLY | os.O_DIRECTORY)) == lstat(place, ".")


def test_open_beneath_makes_files_with_the_mode_asked_for(place: Place) -> None:
    fd = paths.open_beneath(place.fd, b"new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    assert os.fstat(fd).st_mode & 0o7777 == 0o600
    os.close(fd)


@pytest.mark.parametrize("target", ["/", "dir", ".", "..", "/proc/self/root", "dir/../../.."])
@pytest.mark.parametrize("path", [b"link", b"link/file", b"dir/link", b"dir/link/file"])
def test_open_beneath_follows_no_symbolic_link(place: Place, target: str, path: bytes) -> None:
    (place.path / "dir").mkdir()
    for folder in (place.path, place.path / "dir"):
        (folder / "link").symlink_to(target)
    with pytest.raises(OSError) as caught:
        paths.open_beneath(place.fd, path, os.O_RDONLY)
    assert caught.value.errno == errno.ELOOP


def test_open_beneath_can_open_a_symbolic_link_itself(place: Place) -> None:
    (place.path / "link").symlink_to("nowhere")
    assert identity(paths.open_beneath(place.fd, b"link", os.O_PATH | os.O_NOFOLLOW)) == lstat(place, "link")


@pytest.mark.parametrize("path", [b"..", b"/", b"/etc", b"dir/../..", b"../disk"])
def test_open_beneath_never_leaves_the_root(place: Place, path: bytes) -> None:
    (place.path / "dir").mkdir()
    with pytest.raises(OSError) as caught:
        paths.open_beneath(place.fd, path, os.O_PATH)
    assert caught.value.errno == errno.EXDEV


def test_open_beneath_follows_no_magic_link() -> None:
    proc = os.open("/proc/self", os.O_PATH)
    try:
        with pytest.raises(OSError) as caught:
            paths.open_beneath(proc, b"root", os.O_PATH | os.O_DIRECTORY)
    finally:
        os.close(proc)
    assert caught.value.errno == errno.ELOOP


@pytest.mark.parametrize("length", [4000, 4090, 4200, 9000, 20000])
def test_open_beneath_opens_paths_longer_than_path_max(place: Place, length: int) -> None:
    deep = make_deep(place, length)
    fd = paths.open_beneath(place.fd, deep, os.O_PATH)
    file_fd = paths.open_beneath(place.fd, deep + b"/file", os.O_RDONLY)
    assert identity(os.open(b"file", os.O_RDONLY, dir_fd=fd)) == identity(file_fd)
    os.close(fd)


@pytest.mark.parametrize("length", [4000, 9000])
def test_open_beneath_follows_no_symbolic_link_in_a_long_path(place: Place, length: int) -> None:
    deep = make_deep(place, length)
    for path in (deep + b"/link", deep + b"/link" * 2000, deep + b"/link/last"):
        with pytest.raises(OSError) as caught:
            paths.open_beneath(place.fd, path, os.O_PATH | os.O_DIRECTORY)
        assert caught.value.errno == errno.ELOOP


def test_open_beneath_never_leaves_the_root_by_a_long_path(place: Place) -> None:
    (place.path / "dir").mkdir()
    path = b"dir/../" * 900
    assert identity(paths.open_beneath(place.fd, path + b"dir", os.O_PATH)) == lstat(place, "dir")
    with pytest.raises(OSError) as caught:
        paths.open_beneath(place.fd, path + b"..", os.O_PATH)
    assert caught.value.errno == errno.EXDEV


@pytest.mark.parametrize("length", [256, 4095, 4096, 10000])
def test_open_beneath_of_a_name_that_is_too_long_says_so(place: Place, length: int) -> None:
    with pytest.raises(OSError) as caught:
        paths.open_beneath(place.fd, b"n" * length, os.O_PATH)
    assert caught.value.errno == errno.ENAMETOOLONG


def test_open_beneath_of_a_name_with_a_nul_opens_nothing(place: Place) -> None:
    (place.path / "a").mkdir()
    with pytest.raises(OSError) as caught:
        paths.open_beneath(place.fd, b"a\0b", os.O_PATH)
    assert caught.value.errno == errno.EINVAL


def test_open_beneath_names_the_path_that_is_missing(place: Place) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        paths.open_beneath(place.fd, b"no\xffwhere", os.O_PATH)
    assert caught.value.filename == b"no\xffwhere"


def failing(number: int, times: int, call: Callable[..., int]) -> Callable[..., int]:
    """A system call that fails so many times before it is made."""
    left = times

    def instead(*arguments: object) -> int:
        nonlocal left
        if left:
            left -= 1
            ctypes.set_errno(number)
            return -1
        return call(*arguments)

    return instead


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EINTR])
def test_open_beneath_tries_again(place: Place, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(paths, "_openat2", failing(number, 10, paths._openat2))
    assert identity(paths.open_beneath(place.fd, b".", os.O_PATH)) == lstat(place, ".")


def test_open_beneath_does_not_try_for_ever(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_openat2", failing(errno.EAGAIN, 10**9, paths._openat2))
    with pytest.raises(BlockingIOError):
        paths.open_beneath(place.fd, b".", os.O_PATH)


def test_open_beneath_says_which_kernel_it_needs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_openat2", failing(errno.ENOSYS, 1, paths._openat2))
    with pytest.raises(OSError, match=r"Linux 5\.6") as caught:
        paths.open_beneath(place.fd, b".", os.O_PATH)
    assert caught.value.errno == errno.ENOSYS


@pytest.mark.parametrize("opener", [paths.open_dir_at, paths.open_dir_read])
def test_a_directory_is_opened_by_name_and_nothing_else_is(place: Place, opener: Callable[[int, bytes], int]) -> None:
    (place.path / "dir").mkdir()
    (place.path / "file").touch()
    (place.path / "link").symlink_to("dir")
    assert identity(opener(place.fd, b"dir")) == lstat(place, "dir")
    for name in (b"file", b"link"):
        with pytest.raises(NotADirectoryError):
            opener(place.fd, name)


def test_open_dir_read_reopens_an_o_path_directory_for_listing(place: Place) -> None:
    (place.path / "file").touch()
    fd = paths.open_dir_read(place.fd)
    assert os.listdir(fd) == ["file"]
    os.close(fd)


def test_fd_path_leads_to_a_symbolic_link_itself(place: Place) -> None:
    (place.path / "link").symlink_to("nowhere")
    fd = os.open(place.path / "link", os.O_PATH | os.O_NOFOLLOW)
    os.chown(paths.fd_path(fd), 3, 4)
    os.close(fd)
    assert os.lstat(place.path / "link").st_uid == 3


def test_child_path_leads_to_one_name(place: Place) -> None:
    (place.path / "file").write_bytes(b"content")
    with open(paths.child_path(place.fd, b"file"), "rb") as file:
        assert file.read() == b"content"
    with pytest.raises(AssertionError):
        paths.child_path(place.fd, b"../file")
