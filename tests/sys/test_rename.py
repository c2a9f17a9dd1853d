"""renameat2."""

import errno
import os
import stat

import pytest

from overlayfs_py.sys import paths, rename
from tests.sys.conftest import Place


def test_rename_moves_between_directories_and_replaces(place: Place) -> None:
    (place.path / "dir").mkdir()
    (place.path / "old").write_text("old")
    (place.path / "dir/new").write_text("new")
    dir_fd = paths.open_dir_at(place.fd, b"dir")
    rename.renameat2(place.fd, b"old", dir_fd, b"new")
    os.close(dir_fd)
    assert (place.path / "dir/new").read_text() == "old"
    assert not (place.path / "old").exists()


def test_rename_noreplace_replaces_nothing(place: Place) -> None:
    (place.path / "old").write_text("old")
    (place.path / "new").write_text("new")
    with pytest.raises(FileExistsError):
        rename.renameat2(place.fd, b"old", place.fd, b"new", rename.RENAME_NOREPLACE)
    assert (place.path / "new").read_text() == "new"
    rename.renameat2(place.fd, b"old", place.fd, b"free", rename.RENAME_NOREPLACE)
    assert (place.path / "free").read_text() == "old"


def test_rename_exchange_swaps_a_file_and_a_directory(place: Place) -> None:
    (place.path / "file").write_text("content")
    (place.path / "dir").mkdir()
    rename.renameat2(place.fd, b"file", place.fd, b"dir", rename.RENAME_EXCHANGE)
    assert (place.path / "file").is_dir()
    assert (place.path / "dir").read_text() == "content"


def test_rename_whiteout_leaves_a_zero_device(place: Place) -> None:
    (place.path / "old").write_text("old")
    rename.renameat2(place.fd, b"old", place.fd, b"new", rename.RENAME_WHITEOUT)
    left = os.lstat(place.path / "old")
    assert stat.S_ISCHR(left.st_mode)
    assert left.st_rdev == 0
    assert (place.path / "new").read_text() == "old"


def test_rename_of_a_missing_name_says_which(place: Place) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        rename.renameat2(place.fd, b"a\xff", place.fd, b"b")
    assert caught.value.filename == b"a\xff"


def test_rename_with_impossible_flags_is_einval(place: Place) -> None:
    (place.path / "old").touch()
    with pytest.raises(OSError) as caught:
        rename.renameat2(place.fd, b"old", place.fd, b"new", rename.RENAME_NOREPLACE | rename.RENAME_EXCHANGE)
    assert caught.value.errno == errno.EINVAL
