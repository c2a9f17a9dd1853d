"""What only the native engine tells and takes: times of birth, the flags of chattr(1), mounts with mapped ids."""

import ctypes
import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.options.rig import traced
from tests.support.inode_flags import APPEND, FS_IOC_FSGETXATTR, IMMUTABLE, NODUMP, flags_of, set_flags
from tests.support.mounts import kernel_mount, our_mount
from tests.support.syscalls import MNT_DETACH, umount


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("lower", "upper", "work", "mnt", "mapped"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "f").write_bytes(b"data")
    (tmp_path / "lower" / "d").mkdir()
    return tmp_path


@pytest.fixture
def mnt(base: Path) -> Iterator[Path]:
    with our_mount(base / "mnt", [base / "lower"], base / "upper", base / "work", "engine=native"):
        yield base / "mnt"


def born(path: Path) -> str:
    return subprocess.run(["stat", "-c", "%W", path], capture_output=True, text=True, check=True, timeout=30).stdout


def test_the_kernel_keeps_where_a_link_leads(layers: Layers) -> None:
    (layers.lower / "link").symlink_to("somewhere")
    with (
        our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "engine=native") as live,
        traced(live.pid, ["readlinkat", "readlink"], layers.base / "trace") as seen,
    ):
        assert {os.readlink(layers.mnt / "link") for _ in range(5)} == {"somewhere"}
        assert len([line for line in seen() if "link" in line]) == 1
        os.unlink(layers.mnt / "link")
        os.symlink("elsewhere", layers.mnt / "link")
        assert os.readlink(layers.mnt / "link") == "elsewhere"


def test_a_time_of_birth_is_that_of_the_real_object(base: Path, mnt: Path) -> None:
    assert born(mnt / "f") == born(base / "lower" / "f") != "0\n"
    assert born(mnt) == born(base / "upper")
    (mnt / "new").touch()
    assert born(mnt / "new") == born(base / "upper" / "new")


@pytest.mark.parametrize("name", ["f", "d"])
def test_flags_are_shown_and_changed_in_a_copy(base: Path, mnt: Path, name: str) -> None:
    before = flags_of(base / "lower" / name)
    assert flags_of(mnt / name) == before
    set_flags(mnt / name, before | NODUMP)
    assert flags_of(mnt / name) == flags_of(base / "upper" / name) == before | NODUMP
    assert flags_of(base / "lower" / name) == before


def test_flags_are_what_the_kernels_overlayfs_shows_of_the_same_upper(base: Path) -> None:
    with our_mount(base / "mnt", [base / "lower"], base / "upper", base / "work", "engine=native"):
        set_flags(base / "mnt" / "f", NODUMP)
        ours = flags_of(base / "mnt" / "f")
    with kernel_mount(base / "mnt", [base / "lower"], base / "upper", base / "work"):
        assert flags_of(base / "mnt" / "f") == ours


@pytest.mark.parametrize("flag", [IMMUTABLE, APPEND])
def test_what_is_immutable_or_grows_only_stays_so(mnt: Path, flag: int) -> None:
    (mnt / "kept").write_bytes(b"data")
    kept = flags_of(mnt / "kept")
    set_flags(mnt / "kept", kept | flag)
    try:
        with pytest.raises(PermissionError):
            (mnt / "kept").write_bytes(b"other")
        with pytest.raises(PermissionError):
            (mnt / "kept").unlink()
        assert (mnt / "kept").read_bytes() == b"data"
    finally:
        set_flags(mnt / "kept", kept)
    (mnt / "kept").unlink()


@pytest.mark.parametrize("engine", ["native", "native,io=passthrough", "portable"])
def test_what_may_only_grow_grows(base: Path, engine: str) -> None:
    path, stored = base / "mnt" / "log", base / "upper" / "log"
    stored.write_bytes(b"data")
    before = flags_of(stored)
    set_flags(stored, before | APPEND)
    try:
        with our_mount(base / "mnt", [base / "lower"], base / "upper", base / "work", f"engine={engine}"):
            for _ in range(2):
                with path.open("ab", buffering=0) as file:
                    file.write(b"more")
                with pytest.raises(PermissionError), path.open("r+b", buffering=0) as file:
                    file.write(b"other")
                with pytest.raises(PermissionError):
                    os.truncate(path, 2)
    finally:
        set_flags(stored, before)
    assert stored.read_bytes() == b"datamoremore"


def test_what_was_written_before_it_was_made_to_grow_only_is_not_written_over(mnt: Path) -> None:
    (mnt / "log").write_bytes(b"data")
    before = flags_of(mnt / "log")
    set_flags(mnt / "log", before | APPEND)
    try:
        with pytest.raises(PermissionError), (mnt / "log").open("r+b", buffering=0) as file:
            file.write(b"other")
        with (mnt / "log").open("ab", buffering=0) as file:
            file.write(b"more")
    finally:
        set_flags(mnt / "log", before)
    assert (mnt / "log").read_bytes() == b"datamore"


def test_extended_flags_are_shown_and_other_ioctls_are_not_known(base: Path, mnt: Path) -> None:
    with (mnt / "f").open("rb") as shown, (base / "lower" / "f").open("rb") as real:
        assert fcntl.ioctl(shown, FS_IOC_FSGETXATTR, bytes(28)) == fcntl.ioctl(real, FS_IOC_FSGETXATTR, bytes(28))
        with pytest.raises(OSError, match=os.strerror(errno.ENOTTY)):
            fcntl.ioctl(shown, 0x5401, bytes(64))


# A mount with mapped ids: open_tree(2), mount_setattr(2), move_mount(2).

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_EMPTY_PATH, _OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 0x1000, 1, 4
_MOUNT_ATTR_IDMAP = 0x100000
_AT_FDCWD = -100


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


@pytest.fixture
def mapped(base: Path, mnt: Path) -> Iterator[Path]:
    """The same mount, where 0 on disk is shown as 100000."""
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = subprocess.Popen(["unshare", "-U", "sleep", "60"])
    try:
        while os.readlink(f"/proc/{namespace.pid}/ns/user") == os.readlink("/proc/self/ns/user"):
            assert namespace.poll() is None
        for kind in ("uid_map", "gid_map"):
            Path(f"/proc/{namespace.pid}/{kind}").write_text("0 100000 1000\n")
        userns = os.open(f"/proc/{namespace.pid}/ns/user", os.O_RDONLY)
        tree = checked(libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(mnt), _OPEN_TREE_CLONE))
        attributes = struct.pack("QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, userns)
        checked(libc.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attributes, len(attributes)))
        target = os.fsencode(base / "mapped")
        checked(libc.syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, target, _MOVE_MOUNT_F_EMPTY_PATH))
        os.close(tree)
        os.close(userns)
    finally:
        namespace.kill()
        namespace.wait()
    try:
        yield base / "mapped"
    finally:
        umount(target, MNT_DETACH)


def test_a_mount_with_mapped_ids_shows_and_makes_them(base: Path, mnt: Path, mapped: Path) -> None:
    shown = (mapped / "f").stat()
    assert (shown.st_uid, shown.st_gid) == (100000, 100000)
    assert (mnt / "f").stat().st_uid == 0
    as_mapped = ["setpriv", "--reuid=100000", "--regid=100000", "--clear-groups", "sh", "-ec"]
    script = "echo hello >new; mkdir dir; ln -s x link; mkfifo fifo; chmod 700 f; echo more >>f; mv new newer; rm fifo"
    subprocess.run([*as_mapped, script], cwd=mapped, check=True, timeout=60)
    for name in ("newer", "dir", "link", "f"):
        made = os.lstat(base / "upper" / name)
        assert (made.st_uid, made.st_gid) == (0, 0), name
        assert os.lstat(mapped / name).st_uid == 100000
    assert (mnt / "newer").read_text() == "hello\n"


def test_trusted_xattrs_show_through_mapped_ids_to_root_alone(base: Path, mnt: Path, mapped: Path) -> None:
    os.setxattr(mnt / "f", "trusted.mine", b"1")
    os.setxattr(mnt / "f", "user.mine", b"1")
    assert set(os.listxattr(mapped / "f")) == {"trusted.mine", "user.mine"}
    code = "import os; print(os.listxattr('f'))"
    done = subprocess.run(
        ["setpriv", "--reuid=100000", "--clear-groups", "/usr/bin/python3", "-c", code],
        cwd=mapped,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "['user.mine']\n"
