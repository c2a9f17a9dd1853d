"""One measurement: fresh directories, a mount, a child process with a time limit, and no trace afterwards.

The child runs the workload, so that one that hangs or dies takes nothing with it: its time over, the FUSE connection is
aborted, and whatever it started is killed.
"""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Protocol

from benchmarks.inputs import Inputs, remove
from benchmarks.peers import MountError, Peer, Stack
from benchmarks.workload import Workload
from tests.support.mounts import CONNECTIONS, MountFailed, unmount
from tests.support.syscalls import MNT_DETACH, umount

_PATIENCE: Final = 10.0  # seconds for daemons to end after their unmount
_LITTLE_PATIENCE: Final = 1.0  # after a failure
IMAGES: Final = ("ext4", "xfs")
"""Filesystems that come with their layer, and are mounted for each measurement."""
_TICKS: Final = os.sysconf("SC_CLK_TCK")

# In a mount and process namespace of its own, so that nothing it starts outlives the command.
_ENTER: Final = """
root=$1
shift
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
exec chroot "$root" "$@"
"""


class WrongResult(Exception):
    """A workload ran, but what it left is not what it should be."""


@dataclass(slots=True)
class Outcome:
    """What one measurement gave: a value in the workload's unit, or an error."""

    value: float | None = None
    cpu: float | None = None
    """Seconds of processor time that the peer's daemons took for it."""
    notes: dict[str, float] = field(default_factory=dict)
    """Side results by name."""
    error: str | None = None


class Watch(Protocol):
    """Something that looks on while the clock runs: a profiler."""

    def start(self, daemons: Sequence[int]) -> None: ...

    def stop(self) -> None: ...


class Site:
    """Where one workload runs on one peer; what workloads use."""

    def __init__(
        self, base: Path, peer: Peer, workload: Workload, inputs: Inputs, *, watch: Watch | None = None
    ) -> None:
        self.base = base
        self.peer = peer
        self.workload = workload
        self.inputs = inputs
        self.size = workload.size
        self.mnt = base / "mnt"
        self._disk = base / "disk"
        self._watch = watch
        self._outcome = Outcome()
        self._stacks: dict[int, Stack] = {}

    # What workloads use.

    @property
    @contextlib.contextmanager
    def clock(self) -> Iterator[None]:
        """What happens inside is measured; several times add up."""
        daemons = self.daemons()
        if self._watch is not None:
            self._watch.start(daemons)
        used = _processor_time(daemons)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            # A daemon that was started meanwhile had used none.
            used = _processor_time(self.daemons()) - used
            if self._watch is not None:
                self._watch.stop()
        self._outcome.value = (self._outcome.value or 0.0) + elapsed
        self._outcome.cpu = (self._outcome.cpu or 0.0) + used

    def record(self, value: float) -> None:
        """The result, in the workload's unit, in place of the clock's."""
        self._outcome.value = value

    def note(self, name: str, value: float) -> None:
        """A side result."""
        self._outcome.notes[name] = value

    def count(self, number: int) -> int:
        """A number of things, fewer in tests."""
        return self.inputs.count(number)

    def input(self, name: str) -> Path:
        return self.inputs.path(name)

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """The standard output of a command; raises WrongResult unless it exits with 0."""
        environment = {"HOME": str(self.base), "LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]}
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        if done.returncode:
            text = (done.stderr or done.stdout).decode(errors="backslashreplace").strip()
            raise WrongResult(f"{command[0]} exited with {done.returncode}: {text[-300:]}")
        return done.stdout.decode(errors="backslashreplace")

    def inside(self, *command: str) -> str:
        """The output of a command in the root at `mnt`, with /proc, /dev and /run."""
        environment = ["env", "-i", "HOME=/root", "LC_ALL=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", _ENTER, "sh", str(self.mnt)]
        return self.run(*enter, *environment, "DEBIAN_FRONTEND=noninteractive", *command)

    def check(self, what: str, found: object, wanted: object) -> None:
        """Raises WrongResult unless two things are equal."""
        if found != wanted:
            raise WrongResult(f"{what}: {found!r} instead of {wanted!r}")

    def drop_caches(self) -> None:
        """Empty the page cache and the caches of names and inodes."""
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        # The workload's own programs are not what is measured.
        for program in ("find", "true"):
            subprocess.run([program, "/dev/null"], stdout=subprocess.DEVNULL, check=True)

    def daemons(self) -> list[int]:
        return self.peer.processes(self.base)

    def memory(self) -> int:
        """Bytes of memory that the daemons hold, shared pages divided among those that share them."""
        total = 0
        for pid in self.daemons():
            found = re.search(rb"^Pss: *(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_bytes(), re.MULTILINE)
            total += int(found[1]) * 1024 if found else 0
        return total

    def mount(self, number: int = 0, lowers: Sequence[Path] = ()) -> Path:
        """Mount the workload's layers, or others, with an upper of its own, and wait for the first answer.

        Returns the mountpoint; each `number` has one.
        """
        mountpoint = self.base / f"mnt{number or ''}"
        self.peer.mount(self._stacks.get(number) or self._stack(number, tuple(lowers)), mountpoint)
        os.listdir(mountpoint)
        return mountpoint

    # What the harness uses.

    def measure(self) -> Outcome:
        """Run the workload in a child process, and leave nothing of it."""
        self.base.mkdir()
        outcome = Outcome(error="the measurement did not end")
        try:
            self._prepare()
            outcome = self._in_child()
        except (MountError, OSError, subprocess.CalledProcessError) as error:
            outcome = Outcome(error=f"{type(error).__name__}: {error}")
        finally:
            inside = self.peer.problem(self.base)
            problem = self._clean(_PATIENCE if outcome.error is None else _LITTLE_PATIENCE)
        # What failed has its reason, and need not end well.
        problems = [one for one in (outcome.error or problem, inside) if one]
        return Outcome(error="; ".join(problems)) if problems else outcome

    def _prepare(self) -> None:
        if self.workload.filesystem in IMAGES:
            self._disk.mkdir()
            image = self.inputs.path(f"image-{self.workload.filesystem}")
            subprocess.run(["mount", "-o", "loop", image, self._disk], check=True)
        self._stack(0)
        if self.workload.mounted:
            self.mount()

    def _stack(self, number: int, lowers: tuple[Path, ...] = ()) -> Stack:
        """Directories for a mount, and all the peer needs before it."""
        upper, work = (self._layers() / f"{kind}{number or ''}" for kind in ("upper", "work"))
        for path in (self.base / f"mnt{number or ''}", upper, work):
            path.mkdir()
        made = self._stacks[number] = Stack(lowers or self._lowers(), upper, work, self.workload.writes)
        self.peer.prepare(made)
        return made

    def _layers(self) -> Path:
        return self._disk if self.workload.filesystem in IMAGES else self.base

    def _lowers(self) -> tuple[Path, ...]:
        if self.workload.filesystem in IMAGES:
            return (self._disk / "layer",)
        found: list[Path] = []
        for name in self.workload.lowers or ("empty",):
            path = self.inputs.path(name)
            # A stack of layers is one input: its directories, by number.
            found += sorted(path.iterdir(), key=lambda one: int(one.name)) if name.startswith("layers-") else [path]
        return tuple(found)

    def _in_child(self) -> Outcome:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            self._child(writing)
        os.close(writing)
        deadline = time.monotonic() + self.workload.limit
        said = bytearray()
        try:
            while True:
                if not select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    abort_connections(self.base)
                    return Outcome(error=f"took more than {self.workload.limit:.0f} s")
                if not (part := os.read(reading, 1 << 16)):
                    break
                said += part
        finally:
            os.close(reading)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return Outcome(**json.loads(said)) if said else Outcome(error="the workload's process died")

    def _child(self, report: int) -> None:
        try:
            os.setsid()
            # Programs that the workload leaves in the background don't hold the report open.
            os.set_inheritable(report, False)
            try:
                self.workload.run(self)
            except (WrongResult, MountError, OSError, subprocess.SubprocessError) as error:
                self._outcome = Outcome(error=f"{type(error).__name__}: {error}")
            if self._outcome.value is None and self._outcome.error is None:
                self._outcome.error = "the workload measured nothing"
            os.write(report, json.dumps(asdict(self._outcome)).encode())
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            raise
        finally:
            os._exit(0)

    def _clean(self, patience: float) -> str:
        """Unmount, end the daemons, remove the directories; returns what went wrong, or nothing."""
        problems: list[str] = []
        daemons = self.daemons()
        for pid in _descendants() - set(daemons):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for mountpoint in reversed(mounts_below(self.base)):
            if mountpoint == str(self._disk):
                for path in self._disk.glob("[uw]*"):
                    remove(path)
            try:
                unmount(mountpoint)
            except MountFailed as error:
                problems.append(str(error))
        if not _gone(daemons, patience):
            problems.append(f"a daemon was still there {patience:.0f} s after the unmount")
            abort_connections(self.base)
            for pid in daemons:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _gone(daemons, _PATIENCE)
        remove(self.base)
        return "; ".join(problems)


def mounts_below(base: Path) -> list[str]:
    """Mountpoints below a directory, in the order in which they were mounted."""
    return [point for point, _ in _mount_table() if point.startswith(f"{base}/")]


def abort_connections(base: Path) -> None:
    """End the FUSE connections of the mounts in a directory: all that wait for them get an error."""
    for number in fuse_connections(base):
        with contextlib.suppress(FileNotFoundError):
            (CONNECTIONS / str(number) / "abort").write_text("1")


def fuse_connections(base: Path) -> list[int]:
    """The numbers of the FUSE connections of the mounts in a directory."""
    below = [device.partition(":") for point, device in _mount_table() if point.startswith(f"{base}/")]
    numbers = [minor for major, _, minor in below if major == "0"]
    return [int(number) for number in numbers if (CONNECTIONS / number).exists()]


def _mount_table() -> list[tuple[str, str]]:
    """The mountpoints of this namespace, and the `major:minor` of each."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        found.append((re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4]), fields[2]))
    return found


def detach_all(base: Path) -> None:
    """Unmount all below a directory whatever uses it, for when a run is broken off."""
    for mountpoint in reversed(mounts_below(base)):
        umount(os.fsencode(mountpoint), MNT_DETACH)


def _descendants() -> set[int]:
    """The processes below this one, which adopts those that are orphaned."""
    family: set[int] = set()
    grown = {os.getpid()}
    while grown:
        family |= grown
        grown = set()
        for parent in family:
            with contextlib.suppress(FileNotFoundError):
                for task in Path(f"/proc/{parent}/task").iterdir():
                    grown |= {int(pid) for pid in (task / "children").read_text().split()}
        grown -= family
    return family - {os.getpid()}


def _processor_time(pids: Sequence[int]) -> float:
    """Seconds, to a clock tick, that processes and their threads have used."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def _gone(pids: Sequence[int], patience: float) -> bool:
    """Whether processes end in time; reaps those that this process has adopted."""

    def all_gone() -> bool:
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        return not any(Path(f"/proc/{pid}").exists() for pid in pids)

    return within(patience, all_gone)


def within(seconds: float, done: Callable[[], bool]) -> bool:
    """Whether something comes true in time."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
