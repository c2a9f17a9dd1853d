"""Making files, their attributes, listings."""

import ctypes
import errno
import os
import stat

import pytest

from overlayfs_py.sys import files, paths
from tests.sys.conftest import Place


def test_a_temporary_file_gets_its_name_at_once(place: Place) -> None:
    fd = files.tmpfile(place.fd, 0o640)
    os.write(fd, b"content")
    assert os.listdir(place.path) == []
    files.link_fd(fd, place.fd, b"name\xff")
    assert os.fstat(fd).st_mode & 0o7777 == 0o640
    os.close(fd)
    assert os.listdir(os.fsencode(place.path)) == [b"name\xff"]


def test_a_temporary_file_takes_no_name_that_is_taken(place: Place) -> None:
    (place.path / "name").write_bytes(b"old")
    fd = files.tmpfile(place.fd, 0o600)
    with pytest.raises(FileExistsError):
        files.link_fd(fd, place.fd, b"name")
    os.close(fd)
    assert (place.path / "name").read_bytes() == b"old"


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG])
def test_a_node_of_any_type_is_made(place: Place, kind: int) -> None:
    rdev = os.makedev(259, 70000) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
    files.make_node(place.fd, b"node", kind | 0o600, rdev)
    made = os.lstat(place.path / "node")
    assert (made.st_mode, made.st_rdev) == (kind | 0o600, rdev)


@pytest.mark.parametrize("by_descriptor", [False, True])
@pytest.mark.parametrize("name", ["file", "dir", "link"])
@pytest.mark.parametrize("atime", [None, 0, 1_700_000_000_123_456_789])
@pytest.mark.parametrize("mtime", [None, -1_500_000_001, 2**31 * 10**9 + 7])
def test_times_are_set_to_the_nanosecond_or_left_alone(
    tmpfs: Place, by_descriptor: bool, name: str, atime: int | None, mtime: int | None
) -> None:
    (tmpfs.path / "file").touch()
    (tmpfs.path / "dir").mkdir()
    (tmpfs.path / "link").symlink_to("file")
    path = tmpfs.path / name
    files.utimens(tmpfs.fd, os.fsencode(name), 11, 22)
    target = os.lstat(tmpfs.path / "file")
    if by_descriptor:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
        files.futimens(fd, atime, mtime)
        os.close(fd)
    else:
        files.utimens(tmpfs.fd, os.fsencode(name), atime, mtime)
    found = os.lstat(path)
    assert found.st_atime_ns == (11 if atime is None else atime)
    assert found.st_mtime_ns == (22 if mtime is None else mtime)
    if name != "file":
        assert os.lstat(tmpfs.path / "file").st_mtime_ns == target.st_mtime_ns


def test_times_of_a_missing_name_say_which(place: Place) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        files.utimens(place.fd, b"no", 1, 2)
    assert caught.value.filename == b"no"


@pytest.fixture(params=["fchmodat2", "older kernel"])
def either_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux with and without fchmodat2."""
    if request.param == "older kernel":

        def missing(*arguments: object) -> int:
            ctypes.set_errno(errno.ENOSYS)
            return -1

        monkeypatch.setattr(files, "_fchmodat2", missing)


@pytest.mark.usefixtures("either_kernel")
@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFDIR, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_chmod_at_sets_all_twelve_bits(place: Place, kind: int) -> None:
    if kind == stat.S_IFDIR:
        (place.path / "name").mkdir()
    else:
        os.mknod(place.path / "name", kind | 0o600)
    files.chmod_at(place.fd, b"name", 0o7751)
    assert os.lstat(place.path / "name").st_mode == kind | 0o7751


@pytest.mark.usefixtures("either_kernel")
def test_chmod_at_follows_no_symbolic_link(place: Place) -> None:
    (place.path / "file").touch(0o600)
    (place.path / "link").symlink_to("file")
    with pytest.raises(OSError) as caught:
        files.chmod_at(place.fd, b"link", 0o777)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert (place.path / "file").stat().st_mode & 0o7777 == 0o600


@pytest.mark.usefixtures("either_kernel")
def test_chmod_at_of_a_missing_name_is_enoent(place: Place) -> None:
    with pytest.raises(FileNotFoundError):
        files.chmod_at(place.fd, b"no", 0o600)


def test_chown_at_follows_no_symbolic_link(place: Place) -> None:
    (place.path / "file").touch()
    (place.path / "link").symlink_to("file")
    files.chown_at(place.fd, b"link", 11, -1)
    files.chown_at(place.fd, b"link", -1, 22)
    link, file = os.lstat(place.path / "link"), os.lstat(place.path / "file")
    assert (link.st_uid, link.st_gid) == (11, 22)
    assert (file.st_uid, file.st_gid) == (0, 0)


def listing(place: Place) -> list[tuple[bytes, int, int]]:
    fd = paths.open_dir_read(place.fd)
    try:
        return files.list_dir(fd)
    finally:
        os.close(fd)


def test_a_listing_tells_names_inodes_and_types(place: Place) -> None:
    names = [b"n" * 255, b"\xff\xfe", b" ", b"..x", b"...", b"\n"]
    for name in names:
        os.mknod(name, dir_fd=place.fd)
    os.mkdir(b"dir", dir_fd=place.fd)
    os.symlink(b"x", b"link", dir_fd=place.fd)
    os.mknod(b"char", stat.S_IFCHR, dir_fd=place.fd)
    os.mkfifo(b"fifo", dir_fd=place.fd)
    expected = {
        (name, found.st_ino, stat.S_IFMT(found.st_mode) >> 12)
        for name in [*names, b"dir", b"link", b"char", b"fifo"]
        if (found := os.lstat(os.path.join(os.fsencode(place.path), name)))
    }
    entries = listing(place)
    assert set(entries) == expected
    assert len(entries) == len(expected)


def test_an_empty_directory_lists_nothing(place: Place) -> None:
    assert listing(place) == []


def test_a_listing_starts_over_and_sees_what_is_new(place: Place) -> None:
    fd = paths.open_dir_read(place.fd)
    assert files.list_dir(fd) == []
    (place.path / "new").touch()
    assert [name for name, _, _ in files.list_dir(fd)] == [b"new"]
    assert [name for name, _, _ in files.list_dir(fd)] == [b"new"]
    os.close(fd)


def test_a_listing_of_a_hundred_thousand_entries_is_complete(place: Place) -> None:
    names = [b"name-%06d" % number for number in range(100_000)]
    for name in names:
        os.mknod(name, dir_fd=place.fd)
    entries = listing(place)
    assert sorted(name for name, _, _ in entries) == names
    assert {kind for _, _, kind in entries} == {stat.S_IFREG >> 12}


def test_a_listing_needs_a_readable_directory(place: Place) -> None:
    with pytest.raises(OSError) as caught:
        files.list_dir(place.fd)
    assert caught.value.errno == errno.EBADF
    (place.path / "file").touch()
    fd = os.open(place.path / "file", os.O_RDONLY)
    with pytest.raises(NotADirectoryError):
        files.list_dir(fd)
    os.close(fd)
