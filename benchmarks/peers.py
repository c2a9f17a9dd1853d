"""The peers: one small class each, and PEERS, the list of all.

To add one, write a class with `install`, `version`, `mount` and `is_daemon`, and put an object of it into PEERS.
"""

import compileall
import os
import resource
import select
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.mounts import escape
from tests.support.syscalls import MS_BIND, MS_RDONLY, MS_REMOUNT, mount

ROOT: Final = Path(__file__).resolve().parents[1]
CARGO_ROOT: Final = ROOT / ".cache/bench/cargo"
_PROGRAM: Final = Path(sys.executable).with_name("overlayfs-py")
_LOG: Final = "log"
_START_LIMIT: Final = 60.0  # seconds for a mount command


class PeerMissing(Exception):
    """A peer is not on this machine and can't be installed; the message says what to do."""


class MountError(Exception):
    """A peer's mount command failed; the message is what it printed."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers to mount: lower ones topmost first; `writes` where the workload does."""

    lowers: tuple[Path, ...]
    upper: Path
    work: Path
    writes: bool = False


class Peer:
    """Something to compare; `name` is what PEERS= takes, `fuse` tells whether a daemon serves it."""

    name: str
    title: str
    fuse = True
    ours = False
    only_writes = False
    """It differs from another peer in writing alone, so that only workloads that write are run on it."""

    def install(self) -> None:
        """Find the peer or install it. Raises PeerMissing."""

    def version(self) -> str:
        raise NotImplementedError

    def prepare(self, stack: Stack) -> None:
        """What has to be done before a mount and is no part of it."""

    def mount(self, stack: Stack, mountpoint: Path) -> None:
        """Mount; it answers when this returns, or soon after. Raises MountError."""
        raise NotImplementedError

    def is_daemon(self, argv: Sequence[bytes]) -> bool:
        """Whether a process with these arguments is one of this peer's daemons."""
        return False

    def problem(self, below: Path) -> str:
        """What went wrong inside the daemons of the mounts in a directory, as far as they tell; or nothing."""
        return ""

    def processes(self, below: Path) -> list[int]:
        """The daemons of the mounts in a directory."""
        found = []
        for entry in os.listdir("/proc") if self.fuse else ():
            if entry.isdigit():
                try:
                    command = Path("/proc", entry, "cmdline").read_bytes()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if os.fsencode(below) + b"/" in command and self.is_daemon(command.split(b"\0")):
                    found.append(int(entry))
        return found


class Plain(Peer):
    """The floor: no overlay at all, the same tree in a directory."""

    name = "ext4"
    title = "plain ext4"
    fuse = False

    def version(self) -> str:
        return os.uname().release

    def prepare(self, stack: Stack) -> None:
        if len(stack.lowers) > 1 or stack.writes:
            # The topmost layer comes first, and what is there is kept.
            copy = ["cp", "--archive", "--no-clobber", *([] if stack.writes else ["--link"])]
            _run([*copy, "--target-directory", str(stack.upper), *(f"{lower}/." for lower in stack.lowers)])

    def mount(self, stack: Stack, mountpoint: Path) -> None:
        copied = len(stack.lowers) > 1 or stack.writes
        mount(os.fsencode(stack.upper if copied else stack.lowers[0]), os.fsencode(mountpoint), None, MS_BIND)
        if not stack.writes:
            # A workload that does change what it declared unchanged must not reach the layer.
            mount(b"none", os.fsencode(mountpoint), None, MS_BIND | MS_REMOUNT | MS_RDONLY)


class Kernel(Peer):
    name = "kernel"
    title = "kernel overlayfs"
    fuse = False

    def version(self) -> str:
        return os.uname().release

    def mount(self, stack: Stack, mountpoint: Path) -> None:
        # The options have to fit into a page, so 500 layers need short names.
        parent = os.path.commonpath([lower.parent for lower in stack.lowers])
        lowers = [Path(os.path.relpath(lower, parent)) for lower in stack.lowers]
        options = layers(Stack(tuple(lowers), stack.upper, stack.work))
        _run(["mount", "-t", "overlay", "overlay", "-o", options, str(mountpoint)], cwd=parent)


class FuseOverlayfs(Peer):
    """Debian's, in C."""

    name = "fuse-overlayfs"
    title = "fuse-overlayfs 1 (C)"

    def install(self) -> None:
        install_debian(["fuse-overlayfs"])

    def program(self) -> str:
        return "/usr/bin/fuse-overlayfs"

    def version(self) -> str:
        printed = subprocess.run([self.program(), "--version"], capture_output=True, text=True, check=True).stdout
        return next(line.split()[-1] for line in printed.splitlines() if line.startswith("fuse-overlayfs"))

    def mount(self, stack: Stack, mountpoint: Path) -> None:
        _run([self.program(), "-o", layers(stack), str(mountpoint)])

    def is_daemon(self, argv: Sequence[bytes]) -> bool:
        return argv[0] == os.fsencode(self.program())


class FuseOverlayfs2(FuseOverlayfs):
    """The rewrite in Rust, from crates.io, or built by hand and named by FUSE_OVERLAYFS_2."""

    name = "fuse-overlayfs-2"
    title = "fuse-overlayfs 2 (Rust)"
    crate: Final = "fuse-overlayfs@2.0.0"

    def program(self) -> str:
        return os.environ.get("FUSE_OVERLAYFS_2") or str(CARGO_ROOT / "bin/fuse-overlayfs")

    def install(self) -> None:
        by_hand = os.environ.get("FUSE_OVERLAYFS_2")
        if os.access(self.program(), os.X_OK):
            return
        if by_hand:
            raise PeerMissing(f"FUSE_OVERLAYFS_2 names no program: {by_hand}")
        cargo = shutil.which("cargo") or shutil.which(Path.home() / ".cargo/bin/cargo")
        if cargo is None:
            raise PeerMissing("needs cargo of Rust 1.85 or newer; or set FUSE_OVERLAYFS_2 to the program")
        print(f"building {self.crate}", flush=True)
        done = subprocess.run(
            [cargo, "install", "--quiet", "--locked", "--root", CARGO_ROOT, self.crate],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise PeerMissing(f"cargo install {self.crate} failed: {_last_line(done.stderr)}")


class UnionfsFuse(Peer):
    """With the options that its manual page gives as the example."""

    name = "unionfs-fuse"
    title = "unionfs-fuse"

    def install(self) -> None:
        install_debian(["unionfs-fuse"])

    def version(self) -> str:
        query = ["dpkg-query", "--show", "--showformat=${Version}", "unionfs-fuse"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout

    def mount(self, stack: Stack, mountpoint: Path) -> None:
        branches = ":".join([f"{stack.upper}=RW", *(f"{lower}=RO" for lower in stack.lowers)])
        files = min(32768, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        options = f"cow,max_files={files},allow_other,use_ino,suid,dev"
        _run(["unionfs", "-o", options, branches, str(mountpoint)])

    def is_daemon(self, argv: Sequence[bytes]) -> bool:
        return argv[0] == b"unionfs"


class Ours(Peer):
    """One engine and I/O mode of this checkout."""

    ours = True

    def __init__(self, name: str, options: str, *, only_writes: bool = False) -> None:
        self.name = name
        self.title = f"ours, {name}"
        self.options = options
        self.only_writes = only_writes

    def install(self) -> None:
        if "uring=on" in self.options and not Path("/sys/module/fuse/parameters/enable_uring").exists():
            raise PeerMissing("needs FUSE over io_uring, of Linux 6.14 or newer")
        # As an installation has it: PYTHONDONTWRITEBYTECODE would have each mount compile all its sources.
        for package in ("overlayfs_py", "mount_helper"):
            compileall.compile_dir(ROOT / package, quiet=1)

    def version(self) -> str:
        describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()

    def mount(self, stack: Stack, mountpoint: Path) -> None:
        options = f"{layers(stack)},{self.options}"
        environment = {**os.environ, "OVERLAYFS_PY_LOG": str(mountpoint.with_name(_LOG))}
        _run([str(_PROGRAM), "-o", options, str(mountpoint)], environment=environment)

    def problem(self, below: Path) -> str:
        log = below / _LOG
        text = log.read_text(errors="backslashreplace") if log.exists() else ""
        return f"the daemon logged: {text[-2000:]}" if "Traceback" in text else ""

    def is_daemon(self, argv: Sequence[bytes]) -> bool:
        return argv[1:2] == [os.fsencode(_PROGRAM)]


PEERS: Final[tuple[Peer, ...]] = (
    Plain(),
    Kernel(),
    FuseOverlayfs(),
    FuseOverlayfs2(),
    UnionfsFuse(),
    Ours("portable", "engine=portable"),
    Ours("portable-writeback", "engine=portable,writeback", only_writes=True),
    Ours("native", "engine=native,uring=off"),
    Ours("native-uring", "engine=native,uring=on"),
    Ours("native-passthrough", "engine=native,uring=on,io=passthrough"),
)


def layers(stack: Stack) -> str:
    """The options that name the layers, as the kernel, fuse-overlayfs and we take them."""
    lowers = b":".join(escape(lower) for lower in stack.lowers)
    options = b"lowerdir=" + lowers + b",upperdir=" + escape(stack.upper) + b",workdir=" + escape(stack.work)
    return os.fsdecode(options)


def install_debian(packages: Sequence[str]) -> None:
    """Install those Debian packages that are missing. Raises PeerMissing where apt can't."""
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Package}\n", *packages]
    status = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    missing = [name for name in packages if f"installed {name}" not in status]
    if not missing:
        return
    print(f"installing {' '.join(missing)}", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "-qq", "install", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0", *missing]
    for command in (["apt-get", "-qq", "update"], install):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerMissing(f"{' '.join(command)} failed: {_last_line(done.stderr)}")


def _run(command: Sequence[str], cwd: str | Path | None = None, environment: Mapping[str, str] | None = None) -> None:
    # A daemon may keep standard error open, so a file takes it rather than a pipe that has to end.
    with open(os.memfd_create("stderr"), "w+", errors="backslashreplace") as errors:
        with subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
        ) as process:
            ended = os.pidfd_open(process.pid)
            try:
                # A wait with a limit in subprocess looks again after up to 50 ms, which would be what is measured.
                if not select.select([ended], [], [], _START_LIMIT)[0]:
                    process.kill()
                    raise MountError(f"{command[0]} did not mount within {_START_LIMIT:.0f} s")
            finally:
                os.close(ended)
        if process.returncode:
            errors.seek(0)
            raise MountError(f"{Path(command[0]).name} exited with {process.returncode}: {_last_line(errors.read())}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]
