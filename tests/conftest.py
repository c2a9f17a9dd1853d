"""The test process lives in a private mount namespace, and leaves nothing behind: that is checked at the end."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.support.mounts import CONNECTIONS, REPOSITORY, connections_made, show_connections
from tests.support.syscalls import (
    CLONE_NEWNS,
    MNT_DETACH,
    MS_BIND,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    become_subreaper,
    mount,
    umount,
    unshare,
)

_DISK_FILESYSTEMS: Final = ("ext2/ext3", "xfs", "btrfs")
_PATIENCE: Final = 5.0  # seconds for daemons to end after their unmount


@dataclass(frozen=True, slots=True)
class Layers:
    """Empty directories of one stack, on a disk filesystem."""

    base: Path
    lower: Path
    upper: Path
    work: Path
    mnt: Path

    def add(self, name: str) -> Path:
        """A further empty directory beside the others."""
        path = self.base / name
        path.mkdir()
        return path


@dataclass(frozen=True, slots=True)
class _Before:
    scratch: Path
    mounts: frozenset[str]
    connections: frozenset[str]


_before: pytest.StashKey[_Before] = pytest.StashKey()
_leftovers: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    if os.geteuid() != 0:
        pytest.exit("the tests mount filesystems: run them as root", returncode=4)
    unshare(CLONE_NEWNS)
    mount(b"none", b"/", None, MS_REC | MS_PRIVATE)
    become_subreaper()
    show_connections()
    scratch = _disk_directory() / f"overlayfs-py-tests-{os.getpid()}"
    scratch.mkdir(mode=0o755)
    config.stash[_before] = _Before(scratch, frozenset(_mounts()), frozenset(os.listdir(CONNECTIONS)))


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    yield
    before = session.config.stash.get(_before, None)
    if before is None:
        return
    deadline = time.monotonic() + _PATIENCE
    while (left := _left_behind(before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    session.config.stash[_leftovers] = left
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        _clean_up(before)
    shutil.rmtree(before.scratch)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left = config.stash.get(_leftovers, [])
    if left:
        terminalreporter.section("LEFT BEHIND BY THE TESTS: the run fails", sep="!", red=True, bold=True)
        for line in left:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def scratch(pytestconfig: pytest.Config) -> Path:
    """A directory on a disk filesystem, removed when the run ends."""
    return pytestconfig.stash[_before].scratch


@pytest.fixture
def layers(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Layers]:
    """Empty lower, upper, work and mnt directories on a disk filesystem; removed when the test ends."""
    serial = 0
    while (base := scratch / f"layers-{serial}").exists():
        serial += 1
    base.mkdir()
    made = Layers(base, *(base / name for name in ("lower", "upper", "work", "mnt")))
    for path in (made.lower, made.upper, made.work, made.mnt):
        path.mkdir()
    yield made
    # Not even --one-file-system keeps rm out of a bind mount from the same filesystem.
    still = [line for line in _mounts().values() if line.split(" ")[4].startswith(f"{base}/")]
    assert not still, "\n".join(["not removed, as something is still mounted there:", *still])
    # rm, unlike shutil.rmtree, goes deeper than PATH_MAX and than the recursion limit.
    subprocess.run(["rm", "-rf", "--one-file-system", base], check=True)


@dataclass(frozen=True, slots=True)
class Checkout:
    """The checkout and the interpreter of this run, at paths that every user can reach."""

    path: Path
    python: Path


@pytest.fixture
def checkout(layers: Layers) -> Iterator[Checkout]:
    """The checkout bind-mounted, as it may lie below a directory like /root; read-only, so that nothing can harm it."""
    path = layers.add("checkout")
    python = Path(sys.executable)
    if python.is_relative_to(REPOSITORY):
        python = path / python.relative_to(REPOSITORY)
    mount(os.fsencode(REPOSITORY), os.fsencode(path), None, MS_BIND)
    try:
        mount(b"none", os.fsencode(path), None, MS_REMOUNT | MS_BIND | MS_RDONLY)
        yield Checkout(path, python)
    finally:
        # A daemon that was told to end may still be executing from there.
        umount(os.fsencode(path), MNT_DETACH)


def _disk_directory() -> Path:
    asked = os.environ.get("OVERLAYFS_PY_TEST_DIR")
    candidates = [Path(asked)] if asked else [Path("/var/tmp"), Path("/tmp"), Path(__file__).resolve().parents[1]]
    for candidate in candidates:
        kind = subprocess.run(["stat", "-f", "-c", "%T", candidate], capture_output=True, text=True, check=True).stdout
        if kind.strip() in _DISK_FILESYSTEMS:
            return candidate
    names = ", ".join(map(str, candidates))
    return pytest.exit(f"no ext4, xfs or btrfs among {names}: set OVERLAYFS_PY_TEST_DIR", returncode=4)


def _mounts() -> dict[str, str]:
    """Identifier → description of each mount of this namespace."""
    lines = Path("/proc/self/mountinfo").read_text(errors="backslashreplace").splitlines()
    return {line.split(" ", 1)[0]: line for line in lines}


def _descendants() -> dict[int, str]:
    """Processes below this one, zombies reaped; the subreaper setting makes daemons descendants too."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                parents[int(entry)] = int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1])
    found: dict[int, str] = {}
    family = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in family and pid not in found}:
        for pid in grown:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                command = Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ")
                found[pid] = command.decode(errors="backslashreplace")
        family |= grown
        parents = {pid: parent for pid, parent in parents.items() if pid not in family}
    return found


def _loops(scratch: Path) -> list[str]:
    """Loop devices backed by files of this run."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(FileNotFoundError):
            if backing.read_text().startswith(f"{scratch}/"):
                found.append(backing.parts[3])
    return found


def _orphaned_connections(before: _Before) -> list[str]:
    """FUSE connections made here that are still there; a number taken over by another run is mounted or served."""
    new = connections_made & set(os.listdir(CONNECTIONS)) - before.connections
    for process in Path("/proc").glob("[0-9]*") if new else ():
        with contextlib.suppress(OSError):
            for line in (process / "mountinfo").read_text(errors="backslashreplace").splitlines():
                new.discard(line.split(" ")[2].partition(":")[2])
            for opened in (process / "fdinfo").iterdir():
                new.discard(opened.read_text().partition("fuse_connection:")[2].strip())
    return sorted(new)


def _left_behind(before: _Before) -> list[str]:
    left = [f"process {pid}: {command}" for pid, command in _descendants().items()]
    left += [f"mount: {line}" for identifier, line in _mounts().items() if identifier not in before.mounts]
    left += [f"loop device {name}" for name in _loops(before.scratch)]
    left += [f"FUSE connection {number}" for number in _orphaned_connections(before)]
    left += [f"directory {path}" for path in before.scratch.glob("layers-*")]
    return left


def _clean_up(before: _Before) -> None:
    """Remove what is left, so that one bad run does not spoil the machine."""
    for pid in _descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for identifier, line in reversed(_mounts().items()):
        if identifier not in before.mounts:
            umount(line.split(" ")[4].encode(), MNT_DETACH)
    for name in _loops(before.scratch):
        subprocess.run(["losetup", "-d", f"/dev/{name}"], check=False)
