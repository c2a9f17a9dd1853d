"""Memory maps of files: they agree with read and write, with each other, and outlive what made them."""

import contextlib
import errno
import faulthandler
import mmap
import os
import random
from collections.abc import Iterator
from functools import partial

import pytest

from tests.posix.rig import OTHER, Root, as_user, child, fails, in_parallel, opened, prepared, read, write

PAGE = mmap.PAGESIZE
DATA = b"".join(bytes([65 + number]) * PAGE for number in range(8))


def build_file() -> None:
    write("f", DATA, 0o666)


@contextlib.contextmanager
def mapped(
    path: str,
    *,
    flags: int = mmap.MAP_SHARED,
    prot: int = mmap.PROT_READ | mmap.PROT_WRITE,
    mode: int = os.O_RDWR,
    length: int = 0,
) -> Iterator[mmap.mmap]:
    """A map of a file whose descriptor is closed already."""
    with opened(path, mode) as descriptor:
        area = mmap.mmap(descriptor, length, flags=flags, prot=prot)
    with area:
        yield area


@prepared(build_file)
def test_what_is_stored_through_a_map_is_read(root: Root) -> None:
    with opened("f") as reader, mapped("f") as area:
        area[10:15] = b"store"
        area[5 * PAGE : 5 * PAGE + 3] = b"far"
        assert os.pread(reader, 5, 10) == b"store"
        assert read("f")[10:15] == b"store"
        assert as_user(OTHER, lambda: read("f")[5 * PAGE : 5 * PAGE + 3]) == b"far"
    assert read("f") == DATA[:10] + b"store" + DATA[15 : 5 * PAGE] + b"far" + DATA[5 * PAGE + 3 :]


@prepared(build_file)
def test_what_is_written_is_loaded_through_a_map(root: Root) -> None:
    with mapped("f") as area, opened("f", os.O_RDWR) as writer:
        assert area[:5] == b"AAAAA"
        os.pwrite(writer, b"write", 0)
        assert area[:5] == b"write"
        as_user(OTHER, os.pwrite, writer, b"other", 3 * PAGE - 2)
        assert area[3 * PAGE - 2 : 3 * PAGE + 3] == b"other"
        with opened("f", os.O_WRONLY | os.O_APPEND) as appender:
            os.write(appender, b"end")
        assert len(read("f")) == 8 * PAGE + 3


@prepared(build_file)
def test_two_maps_of_a_file_are_one_memory(root: Root) -> None:
    with mapped("f") as first, mapped("f") as second:
        first[100:105] = b"first"
        assert second[100:105] == b"first"
        second[PAGE : PAGE + 6] = b"second"
        assert first[PAGE : PAGE + 6] == b"second"


@prepared(build_file)
def test_maps_in_many_processes_are_one_memory(root: Root) -> None:
    def count(worker: int) -> None:
        with mapped("f") as area:
            for number in range(500):
                area[worker * 4 + number % 4] = number % 200
            area[PAGE * worker : PAGE * worker + 8] = b"worker%02d" % worker

    with mapped("f") as area:
        in_parallel([partial(count, worker) for worker in range(1, 6)])
        for worker in range(1, 6):
            assert area[PAGE * worker : PAGE * worker + 8] == b"worker%02d" % worker


@prepared(build_file)
def test_a_private_map_is_never_written_back(root: Root) -> None:
    with mapped("f", flags=mmap.MAP_PRIVATE, mode=os.O_RDONLY) as area:
        area[:7] = b"private"
        area.flush()
        assert area[:7] == b"private"
        assert read("f") == DATA


@prepared(build_file)
def test_a_shared_writable_map_needs_a_writable_descriptor(root: Root) -> None:
    for mode in (os.O_RDONLY, os.O_WRONLY):
        with opened("f", mode) as descriptor, pytest.raises(PermissionError) as caught:
            mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        assert caught.value.errno == errno.EACCES


@prepared(build_file)
def test_a_flushed_map_advances_mtime_and_ctime(root: Root) -> None:
    with mapped("f") as area, root.touches(f="mc"):
        area[:3] = b"new"
        area.flush()
    assert read("f")[:3] == b"new"


@prepared(build_file)
def test_a_map_survives_the_removal_and_replacement_of_its_file(root: Root) -> None:
    write("other", b"other")
    with mapped("f") as area:
        os.rename("other", "f")
        area[:4] = b"gone"
        area.flush()
        assert area[:4] == b"gone"
        assert area[-1:] == b"H"
        assert read("f") == b"other"
    with mapped("f", prot=mmap.PROT_READ, mode=os.O_RDONLY) as area:
        os.unlink("f")
        assert area[:] == b"other"


@prepared(build_file)
def test_a_map_of_a_file_that_grows_sees_the_rest_of_its_page(root: Root) -> None:
    with mapped("f", length=PAGE) as area:
        os.truncate("f", 100)
        assert area[100:110] == b"\0" * 10
        area[50:60] = b"0123456789"
        os.truncate("f", 200)
        assert area[90:110] == b"A" * 10 + b"\0" * 10
        with opened("f", os.O_WRONLY) as writer:
            os.pwrite(writer, b"grown", 150)
        assert area[150:155] == b"grown"
    assert os.stat("f").st_size == 200


@prepared(build_file)
def test_bytes_stored_past_the_end_of_a_file_are_lost(root: Root) -> None:
    with mapped("f", length=PAGE) as area:
        os.truncate("f", 100)
        area[100:104] = b"lost"
        area.flush()
    os.truncate("f", 200)
    assert read("f") == b"A" * 100 + b"\0" * 100


@prepared(build_file)
def test_a_load_past_the_end_raises_a_bus_error(root: Root) -> None:
    def overrun() -> None:
        faulthandler.disable()
        with mapped("f") as area:
            os.truncate("f", PAGE)
            area[2 * PAGE]

    with child(overrun) as process, pytest.raises(AssertionError, match="status 7 "):
        process.join()


@prepared(build_file)
def test_truncating_empties_mapped_pages(root: Root) -> None:
    with mapped("f") as area:
        area[PAGE + 10 : PAGE + 14] = b"tail"
        os.truncate("f", PAGE + 5)
        os.truncate("f", 8 * PAGE)
        assert area[PAGE : PAGE + 5] == b"B" * 5
        assert area[PAGE + 5 : 2 * PAGE] == b"\0" * (PAGE - 5)
    assert read("f") == DATA[: PAGE + 5].ljust(8 * PAGE, b"\0")


@prepared(build_file)
def test_a_read_only_map_sees_what_is_written_after_it_was_made(root: Root) -> None:
    with mapped("f", prot=mmap.PROT_READ, mode=os.O_RDONLY) as area:
        assert area[:5] == b"AAAAA"
        with opened("f", os.O_WRONLY) as writer:
            os.pwrite(writer, b"fresh", 0)
            os.pwrite(writer, b"fresh", 4 * PAGE)
        if not (root.may_copy_up and root.traits.stale_maps):
            assert area[:5] == b"fresh"
            assert area[4 * PAGE : 4 * PAGE + 5] == b"fresh"
    assert read("f")[:5] == b"fresh"


@prepared(build_file)
def test_maps_and_calls_agree_through_random_use(root: Root) -> None:
    dice = random.Random(11)
    model = bytearray(DATA)
    with mapped("f") as area, opened("f", os.O_RDWR) as descriptor:
        for step in range(400):
            offset = dice.randrange(len(DATA) - 3000)
            data = bytes([step % 256]) * dice.choice([1, 100, 3000])
            choice = dice.randrange(5)
            if choice == 0:
                area[offset : offset + len(data)] = data
                model[offset : offset + len(data)] = data
            elif choice == 1:
                os.pwrite(descriptor, data, offset)
                model[offset : offset + len(data)] = data
            elif choice == 2:
                assert area[offset : offset + 3000] == model[offset : offset + 3000]
            elif choice == 3:
                assert os.pread(descriptor, 3000, offset) == model[offset : offset + 3000]
            else:
                area.flush()
    assert read("f") == bytes(model)


@prepared(build_file)
def test_a_directory_cant_be_mapped(root: Root) -> None:
    with opened(".") as descriptor, fails(errno.ENODEV):
        mmap.mmap(descriptor, PAGE, prot=mmap.PROT_READ)
