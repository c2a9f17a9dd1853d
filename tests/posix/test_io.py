"""Reading and writing: offsets, holes, appending and writing by many, copying between files, syncing."""

import errno
import hashlib
import os
import random
import struct
from functools import partial

import pytest

from tests.posix import calls
from tests.posix.rig import OTHER, Root, as_user, fails, in_parallel, opened, prepared, read, read_all, write

BLOCK = 4096
PATTERN = bytes(range(256)) * 16 * 16  # 16 blocks


def build_file() -> None:
    write("f", PATTERN)
    write("empty")


@prepared(build_file)
def test_every_range_reads_back(root: Root) -> None:
    with opened("f") as descriptor:
        for offset in (0, 1, 4095, 4096, 4097, 65000, 65535, 65536, 70000):
            for length in (0, 1, 10, 4096, 10000, 100000):
                assert os.pread(descriptor, length, offset) == PATTERN[offset : offset + length]
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 0
        buffers = [bytearray(3), bytearray(5000), bytearray(1)]
        assert os.preadv(descriptor, buffers, 4090) == 5004
        assert b"".join(buffers) == PATTERN[4090:9094]


@prepared(build_file)
def test_random_writes_give_what_memory_gives(root: Root) -> None:
    dice = random.Random(7)
    model = bytearray(PATTERN)
    with opened("f", os.O_RDWR) as descriptor:
        for step in range(300):
            offset = dice.randrange(100_000)
            data = bytes([step % 256]) * dice.choice([1, 7, 100, 4096, 9000])
            choice = dice.randrange(10)
            if choice == 0:
                size = dice.randrange(120_000)
                os.ftruncate(descriptor, size)
                model = model[:size].ljust(size, b"\0")
            elif choice < 6:
                os.pwrite(descriptor, data, offset)
                model = model.ljust(offset, b"\0")
                model[offset : offset + len(data)] = data
            else:
                assert os.pread(descriptor, 5000, offset) == bytes(model[offset : offset + 5000])
        assert os.fstat(descriptor).st_size == len(model)
    assert read("f") == bytes(model)


@prepared(build_file)
def test_seeking_goes_by_start_offset_and_end(root: Root) -> None:
    with opened("f", os.O_RDWR) as descriptor:
        assert os.lseek(descriptor, 10, os.SEEK_SET) == 10
        assert os.lseek(descriptor, 5, os.SEEK_CUR) == 15
        assert os.read(descriptor, 2) == PATTERN[15:17]
        assert os.lseek(descriptor, -6, os.SEEK_END) == len(PATTERN) - 6
        assert os.read(descriptor, 100) == PATTERN[-6:]
        assert os.read(descriptor, 100) == b""
        assert os.lseek(descriptor, 100, os.SEEK_END) == len(PATTERN) + 100
        assert os.read(descriptor, 1) == b""
        for offset, whence in ((-1, os.SEEK_SET), (-len(PATTERN) - 200, os.SEEK_END), (0, 99)):
            with fails(errno.EINVAL):
                os.lseek(descriptor, offset, whence)
        assert os.fstat(descriptor).st_size == len(PATTERN)


def build_sparse() -> None:
    with opened("sparse", os.O_RDWR | os.O_CREAT) as descriptor:
        os.pwrite(descriptor, b"D" * 65536, 1 << 20)
        os.pwrite(descriptor, b"E" * 65536, 3 << 20)
        os.ftruncate(descriptor, 4 << 20)


@prepared(build_sparse)
def test_holes_and_data_are_found(root: Root) -> None:
    with opened("sparse") as descriptor:
        if root.traits.holes:
            assert os.lseek(descriptor, 0, os.SEEK_DATA) == 1 << 20
            assert os.lseek(descriptor, 0, os.SEEK_HOLE) == 0
            assert os.lseek(descriptor, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 65536
            assert os.lseek(descriptor, (1 << 20) + 65536, os.SEEK_DATA) == 3 << 20
            with fails(errno.ENXIO):
                os.lseek(descriptor, (3 << 20) + 65536, os.SEEK_DATA)
        else:
            assert os.lseek(descriptor, 0, os.SEEK_DATA) == 0
            assert os.lseek(descriptor, 0, os.SEEK_HOLE) == 4 << 20
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with fails(errno.ENXIO):
                os.lseek(descriptor, 4 << 20, whence)
    assert os.stat("sparse").st_blocks * 512 < 1 << 20


@prepared(build_sparse)
def test_holes_stay_holes_when_a_file_changes(root: Root) -> None:
    digest = hashlib.sha256(read("sparse")).digest()
    os.chmod("sparse", 0o600)
    with opened("sparse", os.O_RDWR) as descriptor:
        os.pwrite(descriptor, b"D", 1 << 20)
    assert hashlib.sha256(read("sparse")).digest() == digest
    assert os.stat("sparse").st_size == 4 << 20
    # The kernel's copy-up goes by pieces of a megabyte.
    assert os.stat("sparse").st_blocks * 512 < 3 << 20


@prepared(build_file)
def test_a_hole_reads_as_zeros_and_takes_no_room(root: Root) -> None:
    with opened("empty", os.O_RDWR) as descriptor:
        os.pwrite(descriptor, b"end", 1 << 30)
        assert os.pread(descriptor, 5000, 1 << 29) == b"\0" * 5000
        assert os.fstat(descriptor).st_size == (1 << 30) + 3
        assert os.fstat(descriptor).st_blocks * 512 < 1 << 20


@prepared(build_file)
def test_files_go_beyond_four_gigabytes(root: Root) -> None:
    with opened("empty", os.O_RDWR) as descriptor:
        for offset in ((1 << 32) - 2, 1 << 32, (1 << 40) + 123):
            os.pwrite(descriptor, b"far", offset)
            assert os.pread(descriptor, 10, offset) == b"far"
        assert os.fstat(descriptor).st_size == (1 << 40) + 126
        os.ftruncate(descriptor, 0)


@prepared(build_file)
def test_appends_by_many_processes_lose_and_tear_nothing(root: Root) -> None:
    def append(writer: int) -> None:
        with opened("empty", os.O_WRONLY | os.O_APPEND) as descriptor:
            for number in range(100):
                os.write(descriptor, struct.pack("<HH", writer, number) * 50)

    in_parallel([partial(append, writer) for writer in range(6)])
    data = read("empty")
    records = [data[start : start + 200] for start in range(0, len(data), 200)]
    assert len(records) == 600
    assert all(record == record[:4] * 50 for record in records)
    seen = [struct.unpack("<HH", record[:4]) for record in records]
    for writer in range(6):
        assert [number for who, number in seen if who == writer] == list(range(100))


@prepared(build_file)
def test_writers_of_separate_ranges_do_not_disturb_each_other(root: Root) -> None:
    def fill(writer: int) -> None:
        with opened("f", os.O_RDWR) as descriptor:
            for number in range(200):
                os.pwrite(descriptor, bytes([writer + 1]) * 100, (number * 6 + writer) * 100)

    in_parallel([partial(fill, writer) for writer in range(6)])
    data = read("f")
    expected = b"".join(bytes([writer + 1]) * 100 for _ in range(200) for writer in range(6))
    assert data[: len(expected)] == expected
    assert len(data) == max(len(expected), len(PATTERN))


@prepared(build_file)
def test_a_reader_sees_each_write_at_once(root: Root) -> None:
    with opened("f") as reader, opened("f", os.O_RDWR) as writer:
        seen = os.pread(reader, 10, 0)
        assert seen == PATTERN[:10]
        for turn in range(20):
            as_user(OTHER, os.pwrite, writer, b"turn %05d" % turn, 0)
            assert os.pread(writer, 10, 0) == b"turn %05d" % turn
            assert os.pread(reader, 10, 0) == b"turn %05d" % turn
            assert read("f")[:10] == b"turn %05d" % turn


@prepared(build_file)
def test_a_file_is_copied_inside_the_kernel(root: Root) -> None:
    with opened("f") as source, opened("copy", os.O_RDWR | os.O_CREAT) as target:
        done = 0
        while done < len(PATTERN):
            done += os.copy_file_range(source, target, len(PATTERN) - done, done, done)
        assert os.copy_file_range(source, target, 100, len(PATTERN), 0) == 0
    assert read("copy") == PATTERN
    with opened("f", os.O_RDWR) as descriptor:
        assert os.copy_file_range(descriptor, descriptor, 1000, 0, 30_000) == 1000
        with fails(errno.EINVAL):
            os.copy_file_range(descriptor, descriptor, 1000, 0, 500)
    assert read("f")[30_000:31_000] == PATTERN[:1000]
    assert read("copy") == PATTERN


@prepared(build_file)
def test_a_file_is_sent_to_a_pipe_and_to_a_file(root: Root) -> None:
    receiver, sender = os.pipe()
    try:
        with opened("f") as source, opened("copy", os.O_RDWR | os.O_CREAT) as target:
            assert os.sendfile(sender, source, 100, 5000) == 5000
            assert os.read(receiver, 10_000) == PATTERN[100:5100]
            sent = 0
            while sent < len(PATTERN):
                sent += os.sendfile(target, source, sent, len(PATTERN) - sent)
    finally:
        os.close(receiver)
        os.close(sender)
    assert read("copy") == PATTERN


@prepared(build_file)
def test_splice_moves_bytes_both_ways(root: Root) -> None:
    receiver, sender = os.pipe()
    try:
        with opened("f", os.O_RDWR) as descriptor:
            assert os.splice(descriptor, sender, 3000, offset_src=50) == 3000
            assert os.splice(receiver, descriptor, 3000, offset_dst=20_000) == 3000
    finally:
        os.close(receiver)
        os.close(sender)
    assert read("f") == PATTERN[:20_000] + PATTERN[50:3050] + PATTERN[23_000:]


@prepared(build_file)
def test_syncing_succeeds_on_files_directories_and_the_whole(root: Root) -> None:
    with opened("f", os.O_RDWR) as descriptor, opened(".") as directory:
        os.write(descriptor, b"dirty")
        os.fsync(descriptor)
        os.fdatasync(descriptor)
        os.fsync(directory)
        os.fdatasync(directory)
        calls.syncfs(descriptor)
    with opened("f") as descriptor:
        os.fsync(descriptor)
    with opened("f", os.O_WRONLY | os.O_SYNC) as descriptor:
        assert os.write(descriptor, b"at once") == 7
    with opened("f", os.O_WRONLY | os.O_DSYNC) as descriptor:
        assert os.pwrite(descriptor, b"too", 7) == 3
    assert read("f")[:10] == b"at oncetoo"


@prepared(build_file)
def test_flags_of_single_reads_and_writes_are_honoured(root: Root) -> None:
    with opened("f", os.O_RDWR) as descriptor:
        assert os.pwritev(descriptor, [b"synced"], 0, os.RWF_DSYNC) == 6
        assert os.pwritev(descriptor, [b"synced"], 10, os.RWF_SYNC) == 6
        assert os.pwritev(descriptor, [b"appended"], 0, os.RWF_APPEND) == 8
        buffer = bytearray(6)
        assert os.preadv(descriptor, [buffer], 10, os.RWF_HIPRI) == 6
        assert buffer == b"synced"
    assert read("f") == b"synced" + PATTERN[6:10] + b"synced" + PATTERN[16:] + b"appended"


@prepared(build_file)
def test_advice_is_taken_and_changes_nothing(root: Root) -> None:
    with opened("f", os.O_RDWR) as descriptor:
        for advice in (os.POSIX_FADV_SEQUENTIAL, os.POSIX_FADV_WILLNEED, os.POSIX_FADV_DONTNEED, os.POSIX_FADV_RANDOM):
            os.posix_fadvise(descriptor, 0, 0, advice)
        assert calls.call("readahead", descriptor, 0, len(PATTERN)) == 0
        assert read_all(descriptor) == PATTERN


@prepared(build_file)
def test_reading_into_the_page_cache_and_dropping_it_changes_nothing(root: Root) -> None:
    with opened("f", os.O_RDWR) as descriptor:
        os.pwrite(descriptor, b"dirty", 5000)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(descriptor, 5, 5000) == b"dirty"
    assert read("f") == PATTERN[:5000] + b"dirty" + PATTERN[5005:]


@prepared(build_file)
def test_writing_nothing_changes_nothing(root: Root) -> None:
    with opened("f", os.O_RDWR) as descriptor:
        assert os.write(descriptor, b"") == 0
        assert os.pwrite(descriptor, b"", 1 << 20) == 0
    assert os.stat("f").st_size == len(PATTERN)


@prepared(build_file)
def test_a_large_write_is_complete(root: Root) -> None:
    data = random.Random(3).randbytes(9_000_001)
    write("big", data)
    assert read("big") == data
    with opened("big", os.O_RDWR) as descriptor:
        assert os.pread(descriptor, len(data), 1) == data[1:]
    assert os.stat("big").st_blocks * 512 >= len(data)


def build_preallocation() -> None:
    write("f", PATTERN)


@prepared(build_preallocation)
def test_posix_fallocate_makes_a_file_as_large_as_asked(root: Root) -> None:
    with opened("f", os.O_RDWR) as descriptor:
        os.posix_fallocate(descriptor, 0, 1000)
        assert os.fstat(descriptor).st_size == len(PATTERN)
        with root.touches(f="mc"):
            os.posix_fallocate(descriptor, len(PATTERN) - 10, 20_000)
        assert os.fstat(descriptor).st_size == len(PATTERN) + 19_990
        for offset, length in ((0, 0), (-1, 10), (0, -1)):
            with fails(errno.EINVAL):
                os.posix_fallocate(descriptor, offset, length)
    assert read("f") == PATTERN + b"\0" * 19_990
    with opened("f") as descriptor, fails(errno.EBADF):
        os.posix_fallocate(descriptor, 0, 10)


MODES = {
    "keep-size": (calls.FALLOC_FL_KEEP_SIZE, PATTERN),
    "punch-hole": (
        calls.FALLOC_FL_PUNCH_HOLE | calls.FALLOC_FL_KEEP_SIZE,
        PATTERN[:BLOCK] + b"\0" * 2 * BLOCK + PATTERN[3 * BLOCK :],
    ),
    "zero-range": (calls.FALLOC_FL_ZERO_RANGE, PATTERN[:BLOCK] + b"\0" * 2 * BLOCK + PATTERN[3 * BLOCK :]),
}


@pytest.mark.parametrize("mode", MODES)
@prepared(build_preallocation)
def test_fallocate_changes_a_range_in_place(root: Root, mode: str) -> None:
    flags, expected = MODES[mode]
    with opened("f", os.O_RDWR) as descriptor:
        if not root.traits.fallocate:
            with root.touches(f=""), fails(errno.EOPNOTSUPP):
                calls.fallocate(descriptor, flags, BLOCK, 2 * BLOCK)
            expected = PATTERN
        else:
            calls.fallocate(descriptor, flags, BLOCK, 2 * BLOCK)
        assert os.pread(descriptor, len(PATTERN), 0) == expected
    assert read("f") == expected


@prepared(build_preallocation)
def test_fallocate_refuses_ranges_that_are_none(root: Root) -> None:
    with opened("f", os.O_RDWR) as descriptor, root.touches(f=""):
        for offset, length in ((-1, 10), (0, 0), (0, -1)):
            with fails(errno.EINVAL):
                calls.fallocate(descriptor, 0, offset, length)
        with fails(errno.EOPNOTSUPP):
            calls.fallocate(descriptor, calls.FALLOC_FL_PUNCH_HOLE, 0, BLOCK)
    with opened("f") as descriptor, fails(errno.EBADF):
        calls.fallocate(descriptor, 0, 0, BLOCK)


def test_the_filesystem_tells_its_room_and_limits(root: Root) -> None:
    found = os.statvfs(".")
    assert found.f_namemax == 255
    assert 0 < found.f_bavail <= found.f_bfree <= found.f_blocks
    assert 0 < found.f_ffree <= found.f_files
    assert found.f_bsize >= 512
    assert found.f_frsize >= 512
    with opened(".") as descriptor:
        assert os.fstatvfs(descriptor).f_namemax == 255
    used = found.f_bfree * found.f_frsize
    write("big", os.urandom(8 << 20))
    with opened("big") as descriptor:
        os.fsync(descriptor)
    after = os.statvfs("big")
    assert used - after.f_bfree * after.f_frsize >= 7 << 20


@prepared(build_file)
def test_a_descriptor_reads_on_after_the_file_was_replaced(root: Root) -> None:
    with opened("f") as descriptor:
        start = os.read(descriptor, 1000)
        write("new", b"new")
        os.rename("new", "f")
        assert start + read_all(descriptor) == PATTERN
    assert read("f") == b"new"
