"""Many clients at once on one mount of the native engine, each sure of what its own directory has to show.

    python -m tests.native.stress --seconds 300 --clients 8 [--uring on] [--io passthrough] [--seed 7]

Every client walks a directory of its own (tests.native.walker) and meddles with one they share, where each also appends
records to one file. Meanwhile other mounts come and go, their daemons and the clients tied to one processor or another,
and the kernel drops its caches, which sends forgets. At the end the daemon may have grown no further than it should,
must be gone once unmounted, and what it leaves must be what was done: in a new mount, and in the kernel's overlayfs.
"""

import argparse
import contextlib
import errno
import os
import pickle
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.native.walker import Diverged, Seen, Walker, differences, read_names, seen
from tests.support.caches import drop_names
from tests.support.mounts import CONNECTIONS, REPOSITORY, Mount, kernel_mount, our_mount, show_connections
from tests.support.syscalls import (
    CLONE_NEWNS,
    MS_PRIVATE,
    MS_REC,
    RENAME_EXCHANGE,
    become_subreaper,
    mount,
    renameat2,
    unshare,
)
from tests.support.uring import switch_kept

_KERNEL_OPTIONS: Final = "redirect_dir=on,index=on"
_SHARED: Final = "shared"
_RECORD: Final = 16  # bytes
_PATIENCE: Final = 90.0  # seconds for clients to end after their time
_MOST_DESCRIPTORS: Final = 1024
_MOST_RSS: Final = 120 << 20  # bytes; a ring's buffers are 17 MiB a processor
_MOST_GROWTH: Final = 20 << 20  # bytes, from the first half of a run to its end
_IN_THE_WAY: Final = {
    *(errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP),
    *(errno.EPERM, errno.EBUSY),
}


@dataclass(frozen=True, slots=True)
class Done:
    """What one client has done: how often, how many records it appended, and what its directory has to show."""

    count: int
    records: int
    tree: Seen


@dataclass(slots=True)
class Watched:
    """The daemon over time: resident bytes, and the most descriptors and threads."""

    rss: list[int] = field(default_factory=list)
    descriptors: int = 0
    threads: int = 0

    def look(self, pid: int) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc", str(pid), "status").read_text().splitlines())
        self.rss.append(int(status["VmRSS"].split()[0]) << 10)
        self.threads = max(self.threads, int(status["Threads"]))
        self.descriptors = max(self.descriptors, len(os.listdir(f"/proc/{pid}/fd")))

    def check(self) -> None:
        """See that nothing has grown beyond its bounds; under a sanitizer, which keeps freed memory, not the memory."""
        processors = os.cpu_count() or 1
        # A thread a processor, two at most while requests go both ways; workers for jobs and for data; those that look
        # ahead, keep the pace and close; the main one.
        assert self.threads <= 2 * processors + 2 * max(8, processors) + 4, f"{self.threads} threads"
        assert self.descriptors <= _MOST_DESCRIPTORS, f"{self.descriptors} descriptors"
        if "libasan" in os.environ.get("LD_PRELOAD", ""):
            return
        half = len(self.rss) // 2 + 1
        assert max(self.rss) <= _MOST_RSS, f"{max(self.rss)} bytes resident"
        assert self.rss[-1] <= max(self.rss[:half]) + _MOST_GROWTH, (
            f"resident bytes grew: {self.rss[:: half // 10 + 1]}"
        )


def client(root: Path, number: int, seed: int, seconds: float) -> Done:
    """Walk and meddle for so many seconds; raises Diverged or OSError."""
    walker = Walker(root / f"c{number}", seed)
    dice = random.Random(seed + 1)
    shared = root / _SHARED
    log = os.open(shared / "log", os.O_WRONLY | os.O_APPEND)
    records = 0
    deadline = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < deadline:
        for _ in range(8):
            try:
                walker.step()
            except OSError as error:
                error.add_note(f"in {walker.last}, after {walker.count} operations, seed {seed}")
                raise
            except Diverged as error:
                error.add_note(f"in {walker.last}, after {walker.count} operations, seed {seed}")
                raise
        meddle(shared, dice)
        os.write(log, b"%05d %09d\n" % (number, records))
        records += 1
        rounds += 1
        if rounds % 40 == 0:
            walker.check()
        if rounds % 10 == 0:
            os.sched_setaffinity(0, {dice.randrange(os.cpu_count() or 1)})
    os.close(log)
    walker.close()
    walker.check()
    return Done(walker.count, records, seen(walker.names))


def meddle(shared: Path, dice: random.Random) -> None:
    """Something in the directory that others change, too; what they can be in the way of may fail."""
    one, other = (shared / f"s{dice.randrange(8)}" for _ in range(2))
    try:
        match dice.randrange(12):
            case 0 | 1:
                one.write_bytes(dice.randbytes(dice.randrange(8000)))
            case 2 | 3:
                one.read_bytes()
            case 4:
                one.unlink()
            case 5:
                os.rename(one, other)
            case 6:
                renameat2(bytes(one), bytes(other), RENAME_EXCHANGE)
            case 7:
                os.link(one, other)
            case 8:
                one.mkdir()
            case 9:
                one.rmdir()
            case 10:
                os.truncate(one, dice.randrange(8000))
            case _:
                for entry in os.scandir(shared):
                    with contextlib.suppress(FileNotFoundError):
                        entry.stat(follow_symlinks=False)
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            raise


def lay_out(base: Path, clients: int) -> None:
    """Directories of a stack in which each client, and all of them together, have something in the lower layer."""
    for name in ("lower", "upper", "work", "mnt", f"lower/{_SHARED}"):
        (base / name).mkdir()
    (base / "lower" / _SHARED / "log").touch()
    (base / "lower" / _SHARED / "s0").write_bytes(bytes(3000))
    for number in range(clients):
        home = base / "lower" / f"c{number}"
        (home / "d" / "e").mkdir(parents=True)
        for name in ("a", "b", "d/f", "d/e/g"):
            (home / name).write_bytes(random.Random(number).randbytes(30_000))
        os.link(home / "a", home / "d" / "a")
        (home / "l").symlink_to("d/f")


class Disturbers:
    """Threads that mount, drop caches and watch the daemon until they are told to stop."""

    def __init__(self, base: Path, live: Mount, options: str) -> None:
        self.base = base
        self.live = live
        self.options = options
        self.watched = Watched()
        self.mounts = 0
        self.ended = threading.Event()
        self.errors: list[BaseException] = []
        self.threads = [threading.Thread(target=self._run, args=(what,)) for what in (self._watch, self._mount)]

    def __enter__(self) -> "Disturbers":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def _run(self, what: Any) -> None:
        try:
            what()
        except (OSError, AssertionError) as error:
            self.errors.append(error)

    def _watch(self) -> None:
        tick = 0
        while not self.ended.wait(0.2):
            self.watched.look(self.live.pid)
            tick += 1
            if tick % 8 == 0:
                # Dentries and inodes: the kernel forgets what nobody has open.
                drop_names()

    def _mount(self) -> None:
        other = self.base / "other"
        other.mkdir()
        lay_out(other, 1)
        mnt = other / "mnt"
        while not self.ended.wait(0.05):
            # The daemon inherits this thread's, and no other has it.
            os.sched_setaffinity(0, {self.mounts % (os.cpu_count() or 1)})
            with our_mount(mnt, [other / "lower"], other / "upper", other / "work", self.options):
                (mnt / f"made-{self.mounts}").write_bytes(b"made")
                assert len(list(mnt.iterdir())) == self.mounts + 3
            self.mounts += 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has come to."""

    operations: int
    records: int
    mounts: int
    watched: Watched

    def __str__(self) -> str:
        rss = [size >> 20 for size in (self.watched.rss[0], max(self.watched.rss), self.watched.rss[-1])]
        return (
            f"{self.operations} operations, {self.records} records, {self.mounts} other mounts; the daemon had "
            f"{rss[0]}, at most {rss[1]}, at the end {rss[2]} MiB, at most {self.watched.descriptors} descriptors "
            f"and {self.watched.threads} threads"
        )


def stress(base: Path, *, uring: str, io: str, seconds: float, clients: int, seed: int) -> Outcome:
    """One run in the empty directory `base`, on a disk filesystem; raises AssertionError where something is wrong."""
    lay_out(base, clients)
    lower = seen(read_names(base / "lower"))
    mnt, stack = base / "mnt", (base / "mnt", [base / "lower"], base / "upper", base / "work")
    options = f"engine=native,uring={uring},io={io}"
    with switch_kept() if uring == "on" else contextlib.nullcontext():
        with our_mount(*stack, options, limit=seconds + 2 * _PATIENCE) as live:
            with Disturbers(base, live, options) as disturbers:
                done = _clients(live, mnt, seconds, clients, seed)
            assert not disturbers.errors, disturbers.errors
            disturbers.watched.check()
            _compare("the mount", mnt, done)
        assert not Path("/proc", str(live.pid)).exists()
        with our_mount(*stack, options):
            _compare("a new mount", mnt, done)
    with kernel_mount(*stack, _KERNEL_OPTIONS):
        _compare("the kernel's overlayfs", mnt, done)
    assert not differences(lower, seen(read_names(base / "lower"))), "the lower layer was changed"
    operations, records = (sum(getattr(one, what) for one in done) for what in ("count", "records"))
    return Outcome(operations, records, disturbers.mounts, disturbers.watched)


def _clients(live: Mount, mnt: Path, seconds: float, clients: int, seed: int) -> list[Done]:
    command = [sys.executable, "-m", "tests.native.stress", "--seconds", str(seconds), "--root", str(mnt)]
    started = [
        subprocess.Popen(
            [*command, "--client", str(number), "--seed", str(seed + 1000 * number)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(clients)
    ]
    deadline = time.monotonic() + seconds + _PATIENCE
    done: list[Done] = []
    problems: list[str] = []
    for process in started:
        try:
            out, complaint = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            problems.append(f"client {process.args!r} hangs")
            # Whoever waits for an answer can't be killed before there is one.
            (CONNECTIONS / str(live.connection) / "abort").write_text("1")
            process.kill()
            process.communicate()
            continue
        if process.returncode:
            problems.append(complaint.decode(errors="backslashreplace")[-3000:])
        else:
            done.append(Done(*pickle.loads(out)))
    assert not problems, "\n".join(problems)
    return done


def _compare(where: str, mnt: Path, done: Sequence[Done]) -> None:
    """See that a mount shows what the clients have done."""
    for number, one in enumerate(done):
        different = differences(one.tree, seen(read_names(mnt / f"c{number}")))
        assert not different, "\n".join([f"{where} shows client {number}:", *different[:20]])
    log = (mnt / _SHARED / "log").read_bytes()
    found = Counter(log[at : at + _RECORD] for at in range(0, len(log), _RECORD))
    wanted = Counter(
        b"%05d %09d\n" % (number, serial) for number, one in enumerate(done) for serial in range(one.records)
    )
    assert found == wanted, f"{where}: records lost {wanted - found}, or not written so {found - wanted}"


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    unshare(CLONE_NEWNS)
    mount(b"none", b"/", None, MS_REC | MS_PRIVATE)
    become_subreaper()
    show_connections()
    with tempfile.TemporaryDirectory(prefix="overlayfs-py-stress-", dir="/var/tmp") as directory:
        yield Path(directory)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.native.stress", description="Stress the native engine.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--uring", choices=["off", "on"], default="off")
    parser.add_argument("--io", choices=["cached", "passthrough"], default="cached")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.client is not None:
        one = client(asked.root, asked.client, asked.seed, asked.seconds)
        # Not as a Done, whose module has another name there.
        sys.stdout.buffer.write(pickle.dumps((one.count, one.records, one.tree)))
        return 0
    with _scratch() as base:
        print(
            stress(base, uring=asked.uring, io=asked.io, seconds=asked.seconds, clients=asked.clients, seed=asked.seed)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
