"""How data gets to disk and how long the kernel keeps what it knows: volatile, fsync, timeout, writeback, max_write."""

import fcntl
import mmap
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.options.conftest import PORTABLE
from tests.options.rig import mounted, traced
from tests.support.caches import names_kept
from tests.support.mounts import Mount, our_mount
from tests.support.syscalls import mount, umount

_SYNCS = ("fsync", "fdatasync", "syncfs", "sync", "sync_file_range", "msync")


def sync_everything(layers: Layers) -> None:
    """Copy up, write, and ask for all of it to be on disk in every way there is."""
    with (layers.mnt / "lower").open("r+b") as file:
        file.write(b"changed")
        file.flush()
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
    descriptor = os.open(layers.mnt / "new", os.O_RDWR | os.O_CREAT | os.O_SYNC)
    os.write(descriptor, b"new")
    os.close(descriptor)
    directory = os.open(layers.mnt, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)
    os.rename(layers.mnt / "new", layers.mnt / "newer")


@pytest.mark.parametrize(("option", "syncs"), [("volatile", False), ("fsync=0", False), ("", True)])
def test_syncing_reaches_the_disk_unless_it_is_turned_off(
    layers: Layers, engine: str, option: str, syncs: bool
) -> None:
    (layers.lower / "lower").write_bytes(b"x" * 300_000)
    trace = layers.base / "trace"
    with mounted(layers, option, engine) as live:
        with traced(live.pid, _SYNCS, trace) as seen:
            sync_everything(layers)
    found = [line for line in seen() if re.search(r"\b\w*sync\w*\(", line)]
    if syncs:
        # the copy, the file twice, what was written with O_SYNC, the directory
        assert len(found) >= 5, found
    else:
        assert found == []
    assert (layers.upper / "lower").read_bytes()[:8] == b"changedx"


# timeout


def behind_our_back(lower: Path) -> None:
    (lower / "mode").chmod(0o604)
    with (lower / "grown").open("a") as file:
        file.write(" and more")
    (lower / "same-size").write_text("other")
    (lower / "new").write_text("new")
    (lower / "gone").unlink()
    (lower / "fresh").write_text("other file")
    os.replace(lower / "fresh", lower / "replaced")
    (lower / "d" / "new").write_text("")


def view(root: Path) -> dict[str, str]:
    """What looking at each name and at the listings shows."""
    shown = {"listing": " ".join(sorted(os.listdir(root))), "d": " ".join(os.listdir(root / "d"))}
    for name in ("mode", "grown", "same-size", "new", "gone", "replaced"):
        try:
            shown[name] = f"{(root / name).stat().st_mode & 0o777:o} {(root / name).read_text()}"
        except FileNotFoundError:
            shown[name] = "missing"
    return shown


def lay_out(lower: Path) -> None:
    lower.mkdir(exist_ok=True)
    for name in ("mode", "grown", "same-size", "gone", "replaced"):
        (lower / name).write_text("first")
        os.utime(lower / name, (1000, 1000))
    (lower / "d").mkdir()


@pytest.fixture
def changing(layers: Layers) -> Layers:
    lay_out(layers.lower)
    return layers


def test_without_a_timeout_changes_of_a_lower_layer_show_at_once(changing: Layers, engine: str) -> None:
    with mounted(changing, "timeout=0", engine):
        before = view(changing.mnt)
        assert (before["listing"], before["new"]) == ("d gone grown mode replaced same-size", "missing")
        behind_our_back(changing.lower)
        assert view(changing.mnt) == view(changing.lower)


def test_timeout_is_how_long_a_change_may_stay_unseen(changing: Layers, engine: str) -> None:
    with mounted(changing, "timeout=0.05", engine):
        view(changing.mnt)
        behind_our_back(changing.lower)
        time.sleep(0.1)
        assert view(changing.mnt) == view(changing.lower)


def test_by_default_names_and_attributes_stay_until_the_next_mount(changing: Layers, engine: str) -> None:
    def known() -> tuple[bool, bool, int]:
        mnt = changing.mnt
        return (mnt / "gone").exists(), (mnt / "new").exists(), (mnt / "mode").stat().st_mode

    with names_kept(), mounted(changing, engine):
        first = known()
        behind_our_back(changing.lower)
        later = known()
    assert first[:2] == (True, False)
    assert later == first
    with mounted(changing, engine):
        assert view(changing.mnt) == view(changing.lower)


# writeback


def test_gathered_writes_give_the_same_file(layers: Layers, engine: str, over_uring: None) -> None:
    (layers.lower / "lower").write_bytes(b"lower" * 5000)
    expected = bytearray(b"lower" * 5000)
    started = time.time_ns()
    with mounted(layers, "writeback", engine):
        new = layers.mnt / "new"
        with new.open("wb", buffering=0) as file:
            for number in range(2000):
                file.write(b"%07d" % number)
            assert os.fstat(file.fileno()).st_size == 14000
        assert started - 10**8 < new.stat().st_mtime_ns < time.time_ns() + 10**8
        with (layers.mnt / "lower").open("r+b", buffering=0) as file:
            for position in range(0, 25000, 251):
                file.seek(position)
                file.write(b"!")
                expected[position : position + 1] = b"!"
            file.seek(0, os.SEEK_END)
            file.write(b"end")
            expected += b"end"
        with (layers.mnt / "lower").open("ab", buffering=0) as file:
            file.write(b"more")
            expected += b"more"
        with (layers.mnt / "lower").open("r+b") as whole, mmap.mmap(whole.fileno(), 0) as mapped:
            mapped[100:104] = b"mmap"
            expected[100:104] = b"mmap"
            assert mapped[:] == expected
        with new.open("r+b", buffering=0) as sparse:
            sparse.seek(20000)
            sparse.write(b"x")
            os.ftruncate(sparse.fileno(), 20010)
            os.utime(sparse.fileno(), ns=(5, 123_456_789_012_345_678))
        assert new.stat().st_mtime_ns == 123_456_789_012_345_678
        content = b"".join(b"%07d" % number for number in range(2000)) + bytes(6000) + b"x" + bytes(9)
        assert new.read_bytes() == content
        assert (layers.mnt / "lower").read_bytes() == expected
        shown = (layers.mnt / "lower").stat()
    assert (layers.upper / "lower").read_bytes() == expected
    assert (layers.upper / "new").read_bytes() == content
    assert (layers.upper / "new").stat().st_mtime_ns == 123_456_789_012_345_678
    with mounted(layers, engine):
        again = (layers.mnt / "lower").stat()
        assert again.st_size == shown.st_size
        # The kernel may send pages that were mapped after the time of their change.
        assert abs(again.st_mtime_ns - shown.st_mtime_ns) < 10**9


def test_what_is_gathered_is_data_to_who_looks_for_holes(layers: Layers, engine: str, over_uring: None) -> None:
    (layers.lower / "lower").write_bytes(b"lower")
    with mounted(layers, "writeback", engine):
        for name, size in (("new", 100_000), ("lower", 200_000)):
            with (layers.mnt / name).open("r+b" if name == "lower" else "wb", buffering=0) as file:
                file.write(b"x" * size)
                assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0
                assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == size


def test_a_change_of_owner_takes_set_id_bits_with_writeback_too(layers: Layers, engine: str, over_uring: None) -> None:
    with mounted(layers, "writeback", engine):
        program = layers.mnt / "program"
        program.write_bytes(b"program")
        program.chmod(0o6755)
        os.chown(program, -1, -1)
        assert stat.S_IMODE(program.stat().st_mode) == 0o755


def test_writes_are_gathered_only_with_writeback(layers: Layers, engine: str) -> None:
    counts = []
    for option in ("writeback", "writeback=0"):
        with mounted(layers, option, engine) as live, traced(live.pid, ["pwrite64"], layers.base / "trace") as seen:
            with (layers.mnt / option).open("wb", buffering=0) as file:
                for _ in range(200):
                    file.write(b"x" * 100)
        counts.append(len(written_sizes(seen())))
        assert sum(written_sizes(seen())) >= 20_000
    assert counts[0] < 20
    # those that cross a page boundary are two
    assert 200 <= counts[1] <= 205


def written_sizes(lines: list[str]) -> list[int]:
    return [int(match[1]) for line in lines if (match := re.search(r"pwrite64.* = (\d+)$", line))]


# max_write


def written_and_read_back(layers: Layers, live: Mount, size: int) -> tuple[bytes, list[int]]:
    """Data written by one call to a file, and found there; in what pieces the daemon wrote them."""
    data = os.urandom(size)
    with traced(live.pid, ["pwrite64"], layers.base / "trace") as seen:
        with (layers.mnt / "f").open("wb", buffering=0) as file:
            assert file.write(data) == size
    with (layers.mnt / "f").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == data
    return data, written_sizes(seen())


@pytest.mark.parametrize(("option", "largest"), [("max_write=4096", 4096), ("max_write=70000", 69632)])
def test_no_write_is_larger_than_max_write(
    layers: Layers, engine: str, over_uring: None, option: str, largest: int
) -> None:
    log = layers.base / "log"
    with mounted(layers, option, engine, log=log) as live:
        data, sizes = written_and_read_back(layers, live, 1 << 20)
    warning = "option max_write has no effect in the portable engine"
    if engine == PORTABLE:
        assert warning in log.read_text()
    else:
        assert warning not in log.read_text()
        assert max(sizes) == largest
    assert (layers.upper / "f").read_bytes() == data


@pytest.fixture
def many_pages() -> Iterator[None]:
    """The machine allows requests of 4 MiB, as it did before afterwards."""
    with open("/proc/sys/fs/fuse/max_pages_limit", "r+", encoding="ascii") as limit:
        fcntl.flock(limit, fcntl.LOCK_EX)
        before = limit.read()
        Path(limit.name).write_text("1024")
        try:
            yield
        finally:
            Path(limit.name).write_text(before)


def test_writes_grow_to_what_the_machine_allows(layers: Layers, over_uring: None, many_pages: None) -> None:
    with mounted(layers, "max_write=4194304", "engine=native") as live:
        data, sizes = written_and_read_back(layers, live, 8 << 20)
    assert max(sizes) == 4 << 20
    assert (layers.upper / "f").read_bytes() == data


@pytest.fixture
def on_tmpfs(layers: Layers) -> Iterator[Path]:
    """A directory of a filesystem whose xattrs may be as large as any."""
    path = layers.add("tmpfs")
    mount(b"tmpfs", os.fsencode(path), b"tmpfs")
    try:
        for name in ("lower", "upper", "work"):
            (path / name).mkdir()
        yield path
    finally:
        umount(os.fsencode(path))


def test_small_writes_leave_room_for_the_largest_xattr(
    layers: Layers, on_tmpfs: Path, engine: str, over_uring: None
) -> None:
    value = os.urandom(65536)
    name = "trusted." + "n" * 247
    with our_mount(layers.mnt, [on_tmpfs / "lower"], on_tmpfs / "upper", on_tmpfs / "work", f"max_write=4096,{engine}"):
        (layers.mnt / "f").write_text("")
        os.setxattr(layers.mnt / "f", name, value)
        assert os.getxattr(layers.mnt / "f", name) == value


def test_the_kernel_reads_ahead_half_of_what_a_request_may_carry(layers: Layers, engine: str) -> None:
    with mounted(layers, engine):
        status = os.stat(layers.mnt)
        setting = Path(f"/sys/class/bdi/{os.major(status.st_dev)}:{os.minor(status.st_dev)}/read_ahead_kb")
        deadline = time.monotonic() + 10
        while setting.read_text() != "512\n":
            # It is set once the mount program has what it waits for.
            assert time.monotonic() < deadline, setting.read_text()
            time.sleep(0.01)
