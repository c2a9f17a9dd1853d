"""The native engine on real mounts: what only it can do."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs_py.core.ops import OPERATIONS
from overlayfs_py.engines import native
from tests.support.mounts import our_mount

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


@pytest.fixture
def mnt(tmp_path: Path, uring: str) -> Iterator[Path]:
    for name in ("lower", "upper", "work", "mnt"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "f").write_bytes(b"data" * 50_000)
    options = f"engine=native,uring={uring}"
    with our_mount(tmp_path / "mnt", [tmp_path / "lower"], tmp_path / "upper", tmp_path / "work", options):
        yield tmp_path / "mnt"


def test_every_row_of_the_table_is_served_or_declared() -> None:
    source = "".join(module.read_text() for module in Path(native.__file__).parent.glob("*.pyx"))
    missing = {row for row in OPERATIONS if f'"{row}"' not in source} - native.UNSUPPORTED
    # These two take and hold handles, which this engine has none of; reading and writing name the node.
    assert missing <= {"opendir", "releasedir", "readdir", "open", "create", "release", "read", "write"}


def test_a_file_without_a_name_can_be_given_one(mnt: Path) -> None:
    directory = os.open(mnt, os.O_RDONLY)
    fd = os.open(mnt, os.O_TMPFILE | os.O_RDWR, 0o640)
    try:
        os.write(fd, b"made in secret")
        assert os.fstat(fd).st_nlink == 0
        os.link(f"/proc/self/fd/{fd}", "named", dst_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(fd)
        os.close(directory)
    assert (mnt / "named").read_bytes() == b"made in secret"
    assert (mnt / "named").stat().st_nlink == 1


def test_a_hole_punched_into_a_lower_file_is_found_in_its_copy(mnt: Path, tmp_path: Path) -> None:
    with open(mnt / "f", "r+b") as file:
        subprocess.run(["fallocate", "-p", "-o", "4096", "-l", "65536", mnt / "f"], check=True, timeout=30)
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 4096
        assert os.lseek(file.fileno(), 4096, os.SEEK_DATA) == 4096 + 65536
    assert (tmp_path / "upper" / "f").stat().st_size == 200_000
    assert (tmp_path / "lower" / "f").read_bytes() == b"data" * 50_000


def test_copy_file_range_copies_within_the_mount(mnt: Path) -> None:
    with open(mnt / "f", "rb") as source, open(mnt / "copy", "wb") as target:
        left = 200_000
        while left:
            left -= os.copy_file_range(source.fileno(), target.fileno(), left)
    assert (mnt / "copy").read_bytes() == (mnt / "f").read_bytes()


def test_an_unknown_ioctl_is_enotty_again_and_again(mnt: Path) -> None:
    with open(mnt / "f", "rb") as file:
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                fcntl.ioctl(file.fileno(), 0x5401, bytes(64))
            assert caught.value.errno == errno.ENOTTY


def test_a_slow_copy_up_stops_nobody_else(mnt: Path, tmp_path: Path) -> None:
    with open(tmp_path / "lower" / "large", "wb") as large:
        large.write(os.urandom(1 << 20) * 256)
    writer = threading.Thread(target=lambda: os.truncate(mnt / "large", (256 << 20) - 1))
    writer.start()
    looked = 0
    while writer.is_alive():
        assert (mnt / "f").stat().st_size == 200_000
        os.listdir(mnt)
        looked += 1
    writer.join()
    assert looked > 10
    assert (mnt / "large").stat().st_size == (256 << 20) - 1


def test_each_who_makes_files_has_the_umask_obeyed_that_is_theirs(mnt: Path) -> None:
    """Those who make files in different directories are served at the same time."""
    script = """
        import os, sys
        os.umask(int(sys.argv[2], 8))
        for number in range(100):
            os.close(os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_WRONLY, 0o666))
        """
    umasks = ("000", "022", "077", "027")
    for umask in umasks:
        (mnt / umask).mkdir()
    command = [sys.executable, "-c", textwrap.dedent(script)]
    makers = [subprocess.Popen([*command, mnt / umask, umask]) for umask in umasks]
    assert [maker.wait(timeout=60) for maker in makers] == [0] * len(umasks)
    for umask in umasks:
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (mnt / umask).iterdir()}
        assert modes == {0o666 & ~int(umask, 8)}


def test_files_are_made_and_removed_at_once_while_directories_come_and_go(mnt: Path, tmp_path: Path) -> None:
    """More directories are in use than descriptors are kept of, which are closed under those who make files."""
    script = """
        import os, sys
        for number in range(300):
            folder = f"{sys.argv[1]}/{number}"
            os.mkdir(folder)
            for name in "abc":
                with open(f"{folder}/{name}", "w") as file:
                    file.write(folder)
            os.unlink(f"{folder}/a")
            if number % 2:
                os.unlink(f"{folder}/b")
                os.rename(f"{folder}/c", f"{sys.argv[1]}/c{number}")
                os.rmdir(folder)
        """
    for place in "12":
        (mnt / place).mkdir()
    makers = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), mnt / place]) for place in "12"]
    assert [maker.wait(timeout=100) for maker in makers] == [0, 0]
    for place in "12":
        assert len(os.listdir(mnt / place)) == 300
        for number in range(300):
            kept = mnt / place / (f"c{number}" if number % 2 else f"{number}/c")
            assert kept.read_text() == str(mnt / place / str(number))
            assert (tmp_path / "upper" / kept.relative_to(mnt)).is_file()
            if not number % 2:
                assert sorted(os.listdir(kept.parent)) == ["b", "c"]


def test_a_changed_owner_takes_the_set_id_bits_that_a_plain_filesystem_takes(mnt: Path, tmp_path: Path) -> None:
    for mode in (0o6755, 0o2644, 0o4600, 0o644):
        for folder in (mnt, tmp_path / "lower"):
            path = folder / f"made{mode:o}"
            path.write_bytes(b"")
            path.chmod(mode)
            os.chown(path, 7, 8)
        made, plain = ((folder / f"made{mode:o}").stat() for folder in (mnt, tmp_path / "lower"))
        assert (made.st_mode, made.st_uid, made.st_gid) == (plain.st_mode, 7, 8)


def test_a_made_file_keeps_the_times_it_is_given_and_the_size_it_is_cut_to(mnt: Path) -> None:
    path = mnt / "made"
    path.write_bytes(b"content")
    os.utime(path, ns=(-1_500_000_000, 1_234_567_891))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (-1_500_000_000, 1_234_567_891)
    os.truncate(path, 3)
    assert path.read_bytes() == b"con"


def test_any_number_of_files_removed_while_open_takes_few_descriptors(tmp_path: Path, uring: str) -> None:
    for name in ("lower", "upper", "work", "mnt"):
        (tmp_path / name).mkdir()
    mnt = tmp_path / "mnt"
    files: list[tuple[int, bytes]] = []
    options = f"engine=native,uring={uring}"
    try:
        with our_mount(mnt, [tmp_path / "lower"], tmp_path / "upper", tmp_path / "work", options) as live:
            try:
                for number in range(1500):
                    files.append((os.open(mnt / f"f{number}", os.O_RDWR | os.O_CREAT), b"%d" % number))
                    os.write(*files[-1])
                for number in range(1500):
                    os.unlink(mnt / f"f{number}")
                assert len(os.listdir(f"/proc/{live.pid}/fd")) <= 1024
                for fd, data in files:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    assert os.pread(fd, 10, 0) == data
                    assert os.fstat(fd).st_nlink == 0
                assert len(os.listdir(f"/proc/{live.pid}/fd")) <= 1024
            finally:
                for fd, _ in files:
                    os.close(fd)
    finally:
        assert os.listdir(tmp_path / "work" / "work") == []


def test_listings_are_whole_whoever_decides_whether_they_carry_attributes(tmp_path: Path, uring: str) -> None:
    sizes = {f"{number:04}{'n' * 200}": number for number in range(1500)}
    for name in ("lower", "lower/d", "upper", "upper/d", "work", "mnt"):
        (tmp_path / name).mkdir()
    for name, size in sizes.items():
        (tmp_path / ("upper" if size % 3 else "lower") / "d" / name).write_bytes(bytes(size))
    options = f"engine=native,uring={uring},readdirplus=auto"
    with our_mount(tmp_path / "mnt", [tmp_path / "lower"], tmp_path / "upper", tmp_path / "work", options):
        directory = tmp_path / "mnt" / "d"
        # By name alone, then with attributes while they are listed, then of what is cached.
        for _ in range(2):
            assert sorted(os.listdir(directory)) == sorted(sizes)
            with os.scandir(directory) as entries:
                assert {entry.name: entry.stat().st_size for entry in entries} == sizes
        os.unlink(directory / min(sizes))
        assert len(os.listdir(directory)) == len(sizes) - 1
