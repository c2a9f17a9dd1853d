"""The mount begins at a directory below the root that the kernel makes (ADR 20), of which nobody sees anything but that
the daemon is asked less."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from mount_helper import kernel, unmounting
from tests.conftest import Layers
from tests.options.rig import NOBODY, python_as, traced
from tests.support.mounts import Mount, our_mount
from tests.support.syscalls import MNT_DETACH, MS_BIND, MS_PRIVATE, MS_SHARED, mount, umount
from tests.support.waiting import wait_until

LIMIT = 30
OPEN_TREE, MOVE_MOUNT, FSOPEN = 428, 429, 430


def roots_at(point: Path, table: str = "self") -> list[str]:
    """What each mount at a path shows of its filesystem."""
    lines = Path(f"/proc/{table}/mountinfo").read_text().splitlines()
    return [line.split(" ")[3] for line in lines if line.split(" ")[4] == os.fspath(point)]


def ours(layers: Layers, *options: str) -> AbstractContextManager[Mount]:
    joined = ",".join(("engine=native", "allow_other", *options))
    return our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, joined)


def test_who_is_not_root_walks_from_the_root_without_a_question(layers: Layers) -> None:
    (layers.lower / "d").mkdir()
    (layers.lower / "d" / "f").touch()
    path = layers.mnt / "d" / "f"
    with ours(layers) as live, traced(live.pid, ["getxattr"], layers.base / "trace") as seen:
        python_as(NOBODY, "[os.stat(sys.argv[1]) for _ in range(50)]", path)
    asked = [line for line in seen() if "posix_acl_access" in line]
    assert 1 <= len(asked) <= 4


def test_an_acl_of_the_root_is_obeyed_and_its_change_seen(layers: Layers) -> None:
    (layers.lower / "f").touch()
    with ours(layers):
        stat_it = ("print(os.stat(sys.argv[1]).st_size)", layers.mnt / "f")
        assert python_as(NOBODY, *stat_it) == "0"
        subprocess.run(["setfacl", "-m", f"u:{NOBODY}:-", layers.mnt], check=True, timeout=LIMIT)
        assert python_as(NOBODY, *stat_it) == "EACCES"
        subprocess.run(["setfacl", "-b", layers.mnt], check=True, timeout=LIMIT)
        assert python_as(NOBODY, *stat_it) == "0"


def test_the_name_below_is_any_name_once_it_is_mounted(layers: Layers) -> None:
    with ours(layers):
        assert roots_at(layers.mnt) == ["/merged"]
        assert os.listdir(layers.mnt) == []
        assert not (layers.mnt / "merged").exists()
        (layers.mnt / "merged").write_bytes(b"mine")
        assert (layers.upper / "merged").read_bytes() == (layers.mnt / "merged").read_bytes() == b"mine"
        assert os.stat(layers.mnt / "..").st_ino == layers.base.stat().st_ino
    assert roots_at(layers.mnt) == []


def test_without_acls_it_begins_at_the_root(layers: Layers) -> None:
    with ours(layers, "noacl"):
        assert roots_at(layers.mnt) == ["/"]


@pytest.mark.parametrize(
    ("entry", "root"),
    [
        ("overlay {} fuse.overlayfs-py defaults 0 0", "/"),
        ("  overlay\t{}/  fuse.overlayfs-py", "/"),
        ("# overlay {} fuse.overlayfs-py", "/merged"),
        ("overlay {}/other fuse.overlayfs-py", "/merged"),
        ("", "/merged"),
        ("\\\\server\\share {}", "/"),
        ("one", "/merged"),
    ],
)
def test_an_entry_of_fstab_begins_at_the_root_where_mount_looks_for_it(layers: Layers, entry: str, root: str) -> None:
    table = layers.base / "fstab"
    table.write_text(f"# a table\n{entry.format(layers.mnt)}\n/dev/x\\y /x\\y ext4\n")
    code = f"""
import os, sys
from overlayfs_py.cli.mount_program import main
from overlayfs_py.engines import beginning
beginning.FSTAB = {os.fspath(table)!r}
sys.argv[1:1] = ["-f", "-o"]
sys.exit(main())
"""
    with subprocess.Popen([sys.executable, "-c", code, stack(layers), layers.mnt]) as daemon:
        try:
            wait_until(lambda: bool(roots_at(layers.mnt)) or daemon.poll() is not None)
            assert roots_at(layers.mnt) == [root]
        finally:
            umount(os.fsencode(layers.mnt), MNT_DETACH)
            daemon.wait(LIMIT)


def test_mount_finds_its_entry_of_fstab_and_no_other(layers: Layers) -> None:
    """What mount(8) takes for mounted, it has no work with (libmount's mnt_table_is_fs_mounted)."""
    table = layers.base / "fstab"
    table.write_text(f"overlayfs-py {layers.mnt} fuse.overlayfs-py {stack(layers)} 0 0\n")
    for options, mounted in (("", False), ("noacl", True)):
        with ours(layers, options):
            done = subprocess.run(
                ["mount", "--fake", "--verbose", "--all", "--fstab", table],
                capture_output=True,
                text=True,
                timeout=LIMIT,
                check=False,
            )
            assert ("already mounted" in done.stdout) == mounted, done


def stack(layers: Layers) -> str:
    return f"lowerdir={layers.lower},upperdir={layers.upper},workdir={layers.work},engine=native"


def test_flags_of_the_mount_stay(layers: Layers) -> None:
    with ours(layers, "nosuid", "nodev", "noexec", "ro"):
        fields = [
            line.split(" ")
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if line.split(" ")[4] == os.fspath(layers.mnt)
        ]
        assert [set(one[5].split(",")) for one in fields] == [{"ro", "nosuid", "nodev", "noexec", "noatime"}]


@pytest.fixture
def shared(layers: Layers) -> Iterator[Layers]:
    """A mountpoint on a mount that is shared, as all are where systemd runs."""
    point = layers.add("shared")
    mount(b"tmpfs", os.fsencode(point), b"tmpfs")
    try:
        mount(b"none", os.fsencode(point), None, MS_SHARED)
        (point / "mnt").mkdir()
        yield Layers(layers.base, layers.lower, layers.upper, layers.work, point / "mnt")
    finally:
        mount(b"none", os.fsencode(point), None, MS_PRIVATE)
        umount(os.fsencode(point), MNT_DETACH)


# What a kernel or a place answers that can't do it, by the calls of which the mount is made.
WITHOUT: dict[str, dict[tuple[int, str], int]] = {
    "nothing": {},
    "Linux 6.5": {(OPEN_TREE, "detached"): errno.EINVAL},
    "Linux 6.4": {(OPEN_TREE, "detached"): errno.EINVAL, (MOVE_MOUNT, "beneath"): errno.EINVAL},
    "beneath": {(OPEN_TREE, "detached"): errno.EINVAL, (MOVE_MOUNT, "beneath"): errno.EACCES},
    "open_tree": {(OPEN_TREE, "detached"): errno.EPERM, (OPEN_TREE, "attached"): errno.EPERM},
    "Linux 5.1": {(FSOPEN, ""): errno.ENOSYS},
    "a filter": {(FSOPEN, ""): errno.EPERM},
    "the last step": {(MOVE_MOUNT, ""): errno.EBUSY},
}
PROGRAM = """
import ctypes, errno, os, sys
from mount_helper import kernel
from overlayfs_py.cli.mount_program import main

refused = {refused}
attached = False

class Library:
    def __getattr__(self, name):
        return getattr(real, name)

    def syscall(self, number, *arguments):
        global attached
        number = number.value
        what = (number, "")
        if number == {open_tree}:
            what = (number, "attached" if attached else "detached")
        elif number == {move_mount} and arguments[-1].value & 0x200:
            what = (number, "beneath")
        if what in refused:
            ctypes.set_errno(refused[what])
            return -1
        attached = attached or number == {move_mount}
        return real.syscall(ctypes.c_long(number), *arguments)

real, kernel._LIBC = kernel._LIBC, Library()
sys.argv[1:1] = ["-f", "-o"]
sys.exit(main())
"""


def program(layers: Layers, without: str) -> list[str]:
    script = PROGRAM.format(refused=WITHOUT[without], open_tree=OPEN_TREE, move_mount=MOVE_MOUNT)
    return [sys.executable, "-c", script, stack(layers), os.fspath(layers.mnt)]


@pytest.mark.parametrize(
    ("without", "root"),
    [
        ("Linux 6.5", "/merged"),
        ("Linux 6.4", "/"),
        ("beneath", "/"),
        ("open_tree", "/"),
        ("Linux 5.1", "/"),
        ("a filter", "/"),
    ],
)
def test_where_it_cannot_be_done_it_begins_at_the_root(layers: Layers, without: str, root: str) -> None:
    (layers.lower / "f").touch()
    with subprocess.Popen(program(layers, without)) as daemon:
        try:
            wait_until(lambda: roots_at(layers.mnt) == [root] or daemon.poll() is not None)
            assert os.listdir(layers.mnt) == ["f"]
            # Until it is told that the mount is made, the daemon knows the name; it isn't remembered.
            wait_until(lambda: not (layers.mnt / "merged").exists())
            (layers.mnt / "merged").mkdir()
            assert (layers.upper / "merged").is_dir()
            assert roots_at(layers.mnt) == [root]
        finally:
            umount(os.fsencode(layers.mnt), MNT_DETACH)
            daemon.wait(LIMIT)


@pytest.mark.parametrize("without", ["nothing", "Linux 6.5"])
def test_others_who_share_the_mountpoint_see_one_mount_come_and_go(shared: Layers, without: str) -> None:
    command = ["unshare", "-m", "--propagation", "slave", "sh", "-c", "echo; read end"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        try:
            other.stdout.readline()
            with subprocess.Popen(program(shared, without)) as daemon:
                try:
                    wait_until(lambda: roots_at(shared.mnt) == ["/merged"] or daemon.poll() is not None)
                    assert roots_at(shared.mnt) == roots_at(shared.mnt, str(other.pid)) == ["/merged"]
                finally:
                    umount(os.fsencode(shared.mnt), MNT_DETACH)
                    daemon.wait(LIMIT)
            assert roots_at(shared.mnt) == roots_at(shared.mnt, str(other.pid)) == []
        finally:
            other.stdin.close()


def test_what_fails_at_the_end_leaves_no_mount(layers: Layers) -> None:
    command = program(layers, "the last step")
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        f"overlayfs-py: cannot mount on '{layers.mnt}': {os.strerror(errno.EBUSY)}"
    )
    assert roots_at(layers.mnt) == []


def test_a_daemon_whose_helper_ends_in_between_takes_both_mounts_away(layers: Layers) -> None:
    with ours(layers):
        device = kernel.topmost(os.fsencode(layers.mnt))
        mount(os.fsencode(layers.mnt), os.fsencode(layers.mnt), None, MS_BIND)
        assert len(roots_at(layers.mnt)) == 2
        unmounting.unmount(os.fsencode(layers.mnt), device, lazy=True)
        assert roots_at(layers.mnt) == []
