"""Extended attributes."""

import errno
import os
import threading
from collections.abc import Iterator

import pytest

from overlayfs_py.sys import paths, xattrs
from tests.conftest import Layers
from tests.sys.conftest import Place, mounted, opened

# tmpfs has no user.* before Linux 6.6.
STRANGE = b"trusted.\xff\xfe \xc3"


@pytest.fixture
def opath(place: Place) -> Iterator[int]:
    """An O_PATH descriptor of a file called f."""
    (place.path / "f").touch()
    fd = os.open(place.path / "f", os.O_PATH)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("key", [b"trusted.a", STRANGE, b"security.x"])
@pytest.mark.parametrize("value", [b"", b"y", b"\0\xff" * 500])
def test_what_is_set_is_read_listed_and_removed(place: Place, key: bytes, value: bytes) -> None:
    (place.path / "f").touch()
    xattrs.set(place.fd, b"f", key, value)
    assert xattrs.get(place.fd, b"f", key) == value
    assert xattrs.list(place.fd, b"f") == [key]
    xattrs.remove(place.fd, b"f", key)
    assert xattrs.list(place.fd, b"f") == []


@pytest.mark.parametrize("key", [b"trusted.a", STRANGE])
def test_an_o_path_descriptor_serves_as_well_as_a_name(place: Place, opath: int, key: bytes) -> None:
    xattrs.fset(opath, key, b"value")
    assert xattrs.fget(opath, key) == b"value"
    assert xattrs.get(place.fd, b"f", key) == b"value"
    assert xattrs.flist(opath) == [key]
    xattrs.fremove(opath, key)
    assert xattrs.flist(opath) == []


def test_a_descriptor_of_an_unlinked_file_serves_too(place: Place) -> None:
    (place.path / "f").touch()
    fd = os.open(place.path / "f", os.O_RDONLY)
    (place.path / "f").unlink()
    xattrs.fset(fd, b"trusted.a", b"value")
    assert xattrs.fget(fd, b"trusted.a") == b"value"
    os.close(fd)


def test_create_and_replace_are_told_apart(place: Place, opath: int) -> None:
    with pytest.raises(OSError) as missing:
        xattrs.set(place.fd, b"f", b"trusted.a", b"1", os.XATTR_REPLACE)
    assert missing.value.errno == errno.ENODATA
    xattrs.set(place.fd, b"f", b"trusted.a", b"1", os.XATTR_CREATE)
    with pytest.raises(FileExistsError):
        xattrs.set(place.fd, b"f", b"trusted.a", b"2", os.XATTR_CREATE)
    with pytest.raises(FileExistsError):
        xattrs.fset(opath, b"trusted.a", b"2", os.XATTR_CREATE)
    assert xattrs.fget(opath, b"trusted.a") == b"1"
    xattrs.fset(opath, b"trusted.a", b"3", os.XATTR_REPLACE)
    assert xattrs.fget(opath, b"trusted.a") == b"3"


def test_unknown_flags_are_einval(place: Place, opath: int) -> None:
    for flags in (os.XATTR_CREATE | os.XATTR_REPLACE, 8):
        with pytest.raises(OSError) as caught:
            xattrs.fset(opath, b"trusted.a", b"", flags)
        assert caught.value.errno == errno.EINVAL


def test_a_missing_key_is_enodata(place: Place, opath: int) -> None:
    for call in (
        lambda: xattrs.get(place.fd, b"f", b"trusted.no"),
        lambda: xattrs.fget(opath, b"trusted.no"),
        lambda: xattrs.remove(place.fd, b"f", b"trusted.no"),
        lambda: xattrs.fremove(opath, b"trusted.no"),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.ENODATA


def test_a_symbolic_link_is_never_followed(place: Place) -> None:
    (place.path / "target").touch()
    (place.path / "link").symlink_to("target")
    xattrs.set(place.fd, b"link", b"trusted.mine", b"of the link")
    xattrs.set(place.fd, b"target", b"trusted.mine", b"of the target")
    assert xattrs.get(place.fd, b"link", b"trusted.mine") == b"of the link"
    fd = paths.open_beneath(place.fd, b"link", os.O_PATH | os.O_NOFOLLOW)
    assert xattrs.fget(fd, b"trusted.mine") == b"of the link"
    xattrs.fset(fd, b"trusted.more", b"")
    assert sorted(xattrs.flist(fd)) == sorted(xattrs.list(place.fd, b"link")) == [b"trusted.mine", b"trusted.more"]
    xattrs.fremove(fd, b"trusted.more")
    os.close(fd)
    xattrs.remove(place.fd, b"link", b"trusted.mine")
    assert xattrs.list(place.fd, b"target") == [b"trusted.mine"]


def test_user_xattrs_are_for_files_and_directories_alone(disk: Place) -> None:
    (disk.path / "file").touch()
    (disk.path / "link").symlink_to("file")
    xattrs.set(disk.fd, b"file", b"user.\xff", b"value")
    assert xattrs.list(disk.fd, b"file") == [b"user.\xff"]
    with pytest.raises(PermissionError):
        xattrs.set(disk.fd, b"link", b"user.a", b"")


def test_the_largest_value_there_can_be_is_read(tmpfs: Place) -> None:
    (tmpfs.path / "f").touch()
    value = os.urandom(65536)
    xattrs.set(tmpfs.fd, b"f", b"trusted.large", value)
    assert xattrs.get(tmpfs.fd, b"f", b"trusted.large") == value


def test_a_value_that_changes_size_while_it_is_read_is_read(place: Place) -> None:
    (place.path / "f").touch()
    values = [b"s", b"l" * 2000]
    xattrs.set(place.fd, b"f", b"trusted.a", values[0])
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for value in values:
                xattrs.set(place.fd, b"f", b"trusted.a", value)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        seen = {xattrs.get(place.fd, b"f", b"trusted.a") for _ in range(20000)}
    finally:
        done.set()
        thread.join()
    assert seen <= set(values)


def test_a_filesystem_without_xattrs_says_so(layers: Layers) -> None:
    with mounted(b"ramfs", layers.base / "ramfs", b"ramfs") as path, opened(path) as place:
        (path / "f").touch()
        for call in (
            lambda: xattrs.get(place.fd, b"f", b"user.a"),
            lambda: xattrs.set(place.fd, b"f", b"user.a", b""),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EOPNOTSUPP


def test_a_missing_file_is_enoent(place: Place) -> None:
    with pytest.raises(FileNotFoundError):
        xattrs.list(place.fd, b"no")
    with pytest.raises(FileNotFoundError):
        xattrs.set(place.fd, b"no", b"user.a", b"")
