"""Copying data: what arrives is what was there, holes and all."""

import errno
import fcntl
import os
from collections.abc import Iterator

import pytest

from overlayfs_py.sys import copying, files, syncing
from tests.sys.conftest import Place

MIB = 1 << 20


@pytest.fixture(params=["reflink or range", "range within", "across", "to disk", "by hand"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """An empty source and destination, for each way the data can take."""
    ways = {
        "reflink or range": ("xfs", "xfs"),
        "range within": ("disk", "disk"),
        "across": ("disk", "tmpfs"),
        "to disk": ("tmpfs", "disk"),
        "by hand": ("disk", "disk"),
    }
    source, destination = (request.getfixturevalue(name) for name in ways[request.param])
    if request.param == "by hand":
        monkeypatch.setattr(os, "copy_file_range", refused(errno.ENOSYS))
    fds = files.tmpfile(source.fd, 0o600), files.tmpfile(destination.fd, 0o600)
    yield fds
    for fd in fds:
        os.close(fd)


def refused(number: int) -> object:
    """A system call that is refused."""

    def call(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


def fill(fd: int, size: int, *segments: tuple[int, int]) -> bytes:
    """Make a file of holes with random data at each (offset, length); its content."""
    content = bytearray(size)
    os.ftruncate(fd, size)
    for offset, length in segments:
        content[offset : offset + length] = os.urandom(length)
        os.pwrite(fd, content[offset : offset + length], offset)
    return bytes(content)


def holes(fd: int) -> list[tuple[int, int]]:
    """The stretches of data of a file."""
    found = []
    end = os.fstat(fd).st_size
    pos = 0
    while pos < end:
        try:
            start = os.lseek(fd, pos, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            break
        pos = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, pos))
    return found


LAYOUTS = {
    "empty": (0, ()),
    "one byte": (1, ((0, 1),)),
    "only a hole": (MIB, ()),
    "a page": (4096, ((0, 4096),)),
    "an odd size": (3 * MIB + 17, ((0, 3 * MIB + 17),)),
    "more than one call": (20 * MIB + 5, ((0, 20 * MIB + 5),)),
    "a leading hole": (2 * MIB, ((MIB, MIB),)),
    "a trailing hole": (2 * MIB + 3, ((0, MIB),)),
    "many holes": (8 * MIB, tuple((n * MIB, 65536) for n in range(0, 8, 2))),
    "a huge hole": (1 << 34, (((1 << 33), 4096),)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_has_the_content_the_size_and_the_holes(pair: tuple[int, int], layout: str) -> None:
    src, dst = pair
    size, segments = LAYOUTS[layout]
    if size > 1 << 30:
        os.ftruncate(src, size)
        for offset, length in segments:
            os.pwrite(src, b"x" * length, offset)
        copying.copy_data(src, dst, size)
    else:
        content = fill(src, size, *segments)
        copying.copy_data(src, dst, size)
        assert os.pread(dst, size + 1, 0) == content
    assert os.fstat(dst).st_size == size
    assert holes(dst) == holes(src)


def test_a_part_of_a_file_is_copied_to_the_same_place(pair: tuple[int, int]) -> None:
    src, dst = pair
    content = fill(src, 3 * MIB, (0, 3 * MIB))
    copying.copy_data(src, dst, 2 * MIB + 9, MIB)
    assert os.pread(dst, 3 * MIB, 0) == bytes(MIB) + content[MIB : 2 * MIB + 9]
    os.ftruncate(dst, 0)
    copying.copy_data(src, dst, 0)
    assert os.fstat(dst).st_size == 0


def test_a_copy_that_was_cut_short_is_taken_up_again(pair: tuple[int, int]) -> None:
    src, dst = pair
    content = fill(src, 3 * MIB, (0, MIB), (2 * MIB, MIB))
    copying.copy_data(src, dst, MIB + 4096)
    copying.copy_data(src, dst, 3 * MIB, MIB + 4096)
    assert os.pread(dst, 4 * MIB, 0) == content


@pytest.mark.parametrize("size", [1, 4097, 2 * MIB])
def test_a_source_that_ends_early_is_an_error(pair: tuple[int, int], size: int) -> None:
    src, dst = pair
    fill(src, size - 1, (0, size - 1))
    with pytest.raises(OSError) as caught:
        copying.copy_data(src, dst, size)
    assert caught.value.errno == errno.EIO


def test_a_source_that_ends_in_a_hole_too_early_is_an_error(pair: tuple[int, int]) -> None:
    src, dst = pair
    fill(src, 2 * MIB, (0, MIB))
    with pytest.raises(OSError) as caught:
        copying.copy_data(src, dst, 3 * MIB)
    assert caught.value.errno == errno.EIO


def test_what_lies_beyond_the_size_is_cut_off(disk: Place) -> None:
    src, dst = files.tmpfile(disk.fd, 0o600), files.tmpfile(disk.fd, 0o600)
    content = fill(src, 2 * MIB, (0, 2 * MIB))
    os.ftruncate(dst, 5 * MIB)
    copying.copy_data(src, dst, MIB)
    assert os.pread(dst, 5 * MIB, 0) == content[:MIB]
    os.close(src)
    os.close(dst)


def test_a_whole_file_shares_its_extents_where_the_filesystem_can(xfs: Place) -> None:
    src, dst = files.tmpfile(xfs.fd, 0o600), files.tmpfile(xfs.fd, 0o600)
    content = fill(src, 64 * MIB, (0, 64 * MIB))
    os.fsync(src)
    before = os.fstatvfs(src).f_bfree
    assert copying.copy_data(src, dst, 64 * MIB)
    os.fsync(dst)
    used = (before - os.fstatvfs(src).f_bfree) * os.fstatvfs(src).f_frsize
    assert used < MIB
    assert os.pread(dst, 64 * MIB, 0) == content
    os.close(src)
    os.close(dst)


@pytest.mark.parametrize("number", sorted(copying._CLONE_IMPOSSIBLE))
def test_a_reflink_that_is_refused_becomes_a_copy(disk: Place, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(fcntl, "ioctl", refused(number))
    check_small_copy(disk)


@pytest.mark.parametrize("number", sorted(copying._RANGE_IMPOSSIBLE))
def test_a_range_that_is_refused_is_copied_by_hand(disk: Place, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "copy_file_range", refused(number))
    check_small_copy(disk)


def test_a_range_call_that_copies_nothing_is_not_believed(disk: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", lambda *arguments: 0)
    check_small_copy(disk)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_filesystem_that_cannot_tell_holes_is_all_data(
    disk: Place, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "lseek", refused(number))
    check_small_copy(disk)


def check_small_copy(place: Place) -> None:
    src, dst = files.tmpfile(place.fd, 0o600), files.tmpfile(place.fd, 0o600)
    content = fill(src, 3 * MIB, (MIB, MIB))
    copying.copy_data(src, dst, 3 * MIB)
    assert os.pread(dst, 4 * MIB, 0) == content
    os.close(src)
    os.close(dst)


@pytest.mark.parametrize("call", ["ioctl", "copy_file_range", "lseek", "pwrite"])
def test_any_other_error_is_reported(disk: Place, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    owner = fcntl if call == "ioctl" else os
    if call == "pwrite":
        monkeypatch.setattr(os, "copy_file_range", refused(errno.EXDEV))
    src, dst = files.tmpfile(disk.fd, 0o600), files.tmpfile(disk.fd, 0o600)
    fill(src, MIB, (0, MIB))
    monkeypatch.setattr(owner, call, refused(errno.EDQUOT))
    with pytest.raises(OSError) as caught:
        copying.copy_data(src, dst, MIB)
    assert caught.value.errno == errno.EDQUOT
    monkeypatch.undo()
    os.close(src)
    os.close(dst)


def test_a_destination_that_is_full_is_reported(disk: Place, tmpfs: Place) -> None:
    src, dst = files.tmpfile(disk.fd, 0o600), files.tmpfile(tmpfs.fd, 0o600)
    fill(src, 80 * MIB, (0, 80 * MIB))
    with pytest.raises(OSError) as caught:
        copying.copy_data(src, dst, 80 * MIB)
    assert caught.value.errno == errno.ENOSPC
    os.close(src)
    os.close(dst)


def test_a_destination_opened_for_reading_is_ebadf(disk: Place) -> None:
    src = files.tmpfile(disk.fd, 0o600)
    fill(src, MIB, (0, MIB))
    (disk.path / "dst").touch()
    dst = os.open(disk.path / "dst", os.O_RDONLY)
    with pytest.raises(OSError) as caught:
        copying.copy_data(src, dst, MIB)
    assert caught.value.errno == errno.EBADF
    os.close(src)
    os.close(dst)


def test_a_file_that_does_not_know_its_size_is_copied(disk: Place) -> None:
    src = os.open("/proc/version", os.O_RDONLY)
    content = os.pread(src, 4096, 0)
    dst = files.tmpfile(disk.fd, 0o600)
    copying.copy_data(src, dst, len(content))
    assert os.pread(dst, 4096, 0) == content
    os.close(src)
    os.close(dst)


def test_a_copy_at_once_is_whole_or_fails(disk: Place) -> None:
    src, dst = files.tmpfile(disk.fd, 0o600), files.tmpfile(disk.fd, 0o600)
    os.write(src, b"content")
    copying.copy_at_once(src, dst, 7)
    assert os.pread(dst, 100, 0) == b"content"
    with pytest.raises(OSError, match="shorter than expected"):
        copying.copy_at_once(src, dst, 8)
    os.close(src)
    os.close(dst)


def test_the_disk_begins_to_write_before_a_large_copy_is_whole(disk: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, int, int]] = []

    def begin(fd: int, start: int, count: int, flags: int) -> int:
        begun.append((start, count, os.fstat(fd).st_size))
        return -1

    monkeypatch.setattr(syncing, "_sync_file_range", begin)
    src, dst = files.tmpfile(disk.fd, 0o600), files.tmpfile(disk.fd, 0o600)
    content = fill(src, 20 * MIB, (0, 20 * MIB))
    copying.copy_data(src, dst, 20 * MIB, to_be_synced=True)
    assert os.pread(dst, 20 * MIB, 0) == content
    assert begun == [(0, 8 * MIB, 8 * MIB), (8 * MIB, 8 * MIB, 16 * MIB)]
    os.close(src)
    os.close(dst)
