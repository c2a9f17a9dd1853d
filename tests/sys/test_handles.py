"""File handles and filesystem UUIDs."""

import errno
import os
import subprocess

import pytest

from overlayfs_py.sys import handles, paths
from tests.conftest import Layers
from tests.sys.conftest import KERNEL, Place, mounted, opened


def test_a_handle_survives_a_rename(place: Place) -> None:
    (place.path / "a").touch()
    before = handles.file_handle(place.fd, b"a")
    (place.path / "a").rename(place.path / "b")
    assert handles.file_handle(place.fd, b"b") == before


def test_a_handle_of_a_descriptor_is_that_of_its_name(place: Place) -> None:
    (place.path / "dir").mkdir()
    fd = paths.open_dir_at(place.fd, b"dir")
    assert handles.file_handle(fd, b"") == handles.file_handle(place.fd, b"dir")
    os.close(fd)


def test_a_symbolic_link_has_a_handle_of_its_own(place: Place) -> None:
    (place.path / "file").touch()
    (place.path / "link").symlink_to("file")
    assert handles.file_handle(place.fd, b"link") != handles.file_handle(place.fd, b"file")


def test_a_file_is_opened_by_its_handle_until_it_is_gone(place: Place) -> None:
    (place.path / "file").write_bytes(b"content")
    kind, handle = handles.file_handle(place.fd, b"file")
    mount_fd = paths.open_dir_read(place.fd)
    fd = handles.open_by_handle(mount_fd, kind, handle, os.O_RDONLY)
    assert os.read(fd, 99) == b"content"
    assert not os.get_inheritable(fd)
    os.close(fd)
    (place.path / "file").unlink()
    with pytest.raises(OSError) as caught:
        handles.open_by_handle(mount_fd, kind, handle, os.O_RDONLY)
    assert caught.value.errno == errno.ESTALE
    with pytest.raises(OSError) as caught:
        handles.open_by_handle(mount_fd, kind, bytes(129), os.O_RDONLY)
    assert caught.value.errno == errno.EINVAL
    os.close(mount_fd)


def test_a_missing_name_has_no_handle(place: Place) -> None:
    with pytest.raises(FileNotFoundError):
        handles.file_handle(place.fd, b"no")


def test_a_filesystem_that_opens_no_handles_still_identifies_files(layers: Layers) -> None:
    for name in ("a", "b"):
        (layers.lower / name).touch()
    options = b"lowerdir=%s:%s" % (os.fsencode(layers.lower), os.fsencode(layers.upper))
    with mounted(b"overlay", layers.base / "overlay", b"overlay", options) as path, opened(path) as place:
        if KERNEL < (6, 8):
            with pytest.raises(OSError) as caught:
                handles.file_handle(place.fd, b"a")
            assert caught.value.errno == errno.EOPNOTSUPP
            return
        first = handles.file_handle(place.fd, b"a")
        assert first == handles.file_handle(place.fd, b"a")
        assert first != handles.file_handle(place.fd, b"b")


def test_the_uuid_is_the_one_the_filesystem_was_made_with(xfs: Place, layers: Layers) -> None:
    answer = subprocess.run(["blkid", "-o", "value", "-s", "UUID", layers.base / "xfs.img"], capture_output=True)
    made_with = bytes.fromhex(answer.stdout.decode().replace("-", ""))
    assert handles.filesystem_uuid(xfs.fd) == (made_with if KERNEL >= (6, 9) else None)


def test_a_filesystem_without_a_uuid_has_none() -> None:
    fd = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    assert handles.filesystem_uuid(fd) is None
    os.close(fd)
