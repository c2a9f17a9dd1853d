"""What the tests of the corpus stand on: the root under test, other users' processes, expected errors and times."""

import contextlib
import errno
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, Literal, ParamSpec, TypeVar

import pytest

T = TypeVar("T")
P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., object])

Kind = Literal["ext4", "kernel-overlay", "ours", "native", "rings", "passthrough"]
Flavour = Literal["usual", "read-only", "full", "relatime", "user-marks"]
Place = Literal["fresh", "lower"]

_CLOCK_REALTIME_COARSE: Final = 5  # linux/time.h; os and time lack it

KINDS: Final[tuple[Kind, ...]] = ("ext4", "kernel-overlay", "ours", "native", "rings", "passthrough")

OURS: Final[dict[Kind, str]] = {
    "ours": "engine=portable",
    "native": "engine=native,uring=off",
    "rings": "engine=native,uring=on",
    "passthrough": "engine=native,io=passthrough,uring=on",
}
"""The options that choose what carries our requests: each engine, transport and I/O mode is among them."""


@dataclass(frozen=True, slots=True)
class Traits:
    """Where a kind of root may differ from POSIX or from ext4; each is documented for the filesystem that has it."""

    overlay: bool
    """Attributes of a directory with lower parts may show one link, and a copy-up may advance the ctime of what it
    copies and of the directories above."""
    stale_maps: bool = False
    """A map made from a read-only handle before the copy-up keeps showing the lower file (overlayfs.rst,
    "Non-standard behavior")."""
    half_removed: bool = False
    """What was in a lower layer keeps its link count when it is removed while open, and its attributes can't be
    changed any more."""
    tmpfile: bool = True
    """O_TMPFILE works; else it fails with EOPNOTSUPP."""
    fallocate: bool = True
    """fallocate(2) works; else it fails with EOPNOTSUPP."""
    holes: bool = True
    """SEEK_DATA and SEEK_HOLE tell holes from data; else a file is all data, which POSIX allows."""
    rename_whiteout: bool = True
    """RENAME_WHITEOUT works; else it fails with EINVAL."""
    locking_bit_stays: bool = False
    """Those outside the group leave set-group-id of a file without group execution when they change it, as wherever
    FUSE in the kernel takes these bits itself (fuse_setattr)."""


TRAITS: Final[dict[Kind, Traits]] = {
    "ext4": Traits(overlay=False),
    "kernel-overlay": Traits(overlay=True, stale_maps=True, half_removed=True, rename_whiteout=False),
    "ours": Traits(overlay=True, tmpfile=False, fallocate=False, holes=False, locking_bit_stays=True),
    "native": Traits(overlay=True),
    "rings": Traits(overlay=True),
    "passthrough": Traits(overlay=True),
}


@dataclass(frozen=True, slots=True)
class User:
    """The ids of an unprivileged process."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ROOT: Final = User(0, 0)
OWNER: Final = User(40001, 40001)
MEMBER: Final = User(40002, 40002, (40001,))
OTHER: Final = User(40003, 40003)
BY_ROLE: Final = {"owner": OWNER, "member": MEMBER, "other": OTHER}


def prepared(build: Callable[..., None]) -> Callable[[F], F]:
    """Have `build` make the test's files, with the test's directory as current directory.

    An overlay runs the test twice: the files come through the mount once ("fresh"), and are in a lower layer before
    it is mounted once ("lower"). The builder may take parameters of the test, by name.
    """
    return pytest.mark.prepared.with_args(build)


def in_lower(build: Callable[..., None]) -> Callable[[F], F]:
    """As `prepared`, for tests about copying up: they run on overlays alone, with the files in a lower layer."""
    return pytest.mark.in_lower.with_args(build)


class Root:
    """The directory a test has for itself, which is its current directory, and the filesystem it lies on."""

    __slots__ = ("kept", "kind", "lower", "mount", "path", "place", "traits", "upper")

    def __init__(self, kind: Kind, place: Place, mount: str, path: str, lower: str | None, upper: str | None) -> None:
        self.kept = False
        self.kind = kind
        self.place = place
        self.traits = TRAITS[kind]
        self.mount = mount
        self.path = path
        self.lower = lower
        self.upper = upper

    @property
    def may_copy_up(self) -> bool:
        return self.place == "lower" and self.traits.overlay

    @contextlib.contextmanager
    def touches(self, **expected: str) -> Iterator[None]:
        """Check that the block advances exactly the given times of each file: letters of "amc".

        A keyword names a file of the current directory; `here` is that directory itself. Files are followed by their
        inode, so one may be renamed or removed in the block.
        """
        with contextlib.ExitStack() as stack:
            handles = {}
            for name in expected:
                handles[name] = os.open("." if name == "here" else name, os.O_PATH | os.O_NOFOLLOW)
                stack.callback(os.close, handles[name])
            before = {name: Times.of(handle) for name, handle in handles.items()}
            next_tick()
            yield
            for name, handle in handles.items():
                changed = before[name].changes_to(Times.of(handle))
                # A copy-up can give the copy every time but its ctime, nor that of the directories it fills.
                allowed = set(expected[name]) | ({"c"} if self.may_copy_up else set())
                assert set(expected[name]) <= changed <= allowed, (
                    f"times of {name} that advanced: {''.join(sorted(changed))!r}, expected {expected[name]!r}"
                )

    def check_removed(self, directory: int) -> None:
        """Check that an open directory, which was removed, has no links."""
        links = os.fstat(directory).st_nlink
        assert links == 0 or (self.traits.half_removed and self.place == "lower"), f"{links} links after its removal"

    def check_dir_links(self, path: str, count: int) -> None:
        """Check a directory's link count: two and its subdirectories, or one where an overlay doesn't count."""
        found = os.lstat(path).st_nlink
        assert found == count or (self.traits.overlay and found == 1), f"{path} has {found} links, expected {count}"


@dataclass(frozen=True, slots=True)
class Times:
    """The three times of a file, in nanoseconds."""

    a: int
    m: int
    c: int

    @classmethod
    def of(cls, file: str | bytes | int) -> "Times":
        st = os.fstat(file) if isinstance(file, int) else os.lstat(file)
        return cls(st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns)

    def changes_to(self, later: "Times") -> set[str]:
        for name in "amc":
            was, now = getattr(self, name), getattr(later, name)
            assert now >= was, f"{name}time went back: {was} → {now}"
        return {name for name in "amc" if getattr(later, name) > getattr(self, name)}


def next_tick() -> None:
    """Wait until the clock that filesystems stamp files with, which goes by ticks, has passed the present."""
    start = time.time_ns()
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) <= start:
        time.sleep(0.0005)


class fails:
    """Check that the block raises OSError with one of these error numbers."""

    __slots__ = ("_errnos", "_wanted")

    def __init__(self, *errnos: int) -> None:
        self._errnos = errnos
        self._wanted = "/".join(errno.errorcode[number] for number in errnos)

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if error is None:
            raise AssertionError(f"expected {self._wanted}, but it succeeded")
        if not isinstance(error, OSError):
            return False
        if error.errno not in self._errnos:
            raise AssertionError(f"expected {self._wanted}, got {errno.errorcode.get(error.errno or 0)}") from error
        return True


class Child(Generic[T]):
    """A forked process that runs one function, as another user if asked."""

    __slots__ = ("_pid", "_result")

    def __init__(self, action: Callable[[], T], user: User | None = None) -> None:
        self._result, sink = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _run_child(action, user, sink)
        os.close(sink)

    def join(self) -> T:
        """The function's result. Raises what it raised: OSError, or AssertionError with its traceback."""
        with os.fdopen(self._result, "rb") as source:
            data = source.read()
        pid, self._pid = self._pid, 0
        _, status = os.waitpid(pid, 0)
        assert data, f"the child ended with status {status} and no result"
        outcome, value = pickle.loads(data)
        if outcome == "error":
            raise OSError(value, os.strerror(value))
        if outcome == "failure":
            raise AssertionError(f"in the child:\n{value}")
        result: T = value
        return result

    def kill(self) -> None:
        """End the process if `join` has not."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            os.close(self._result)
            self._pid = 0


def _run_child(action: Callable[[], object], user: User | None, sink: int) -> None:
    """Run in the new process, which must never return into the test run."""
    outcome: tuple[str, Any]
    try:
        try:
            if user is not None:
                os.setgroups(user.groups)
                os.setresgid(user.gid, user.gid, user.gid)
                os.setresuid(user.uid, user.uid, user.uid)
            outcome = ("result", action())
        except OSError as error:
            outcome = ("error", error.errno)
        except AssertionError:
            outcome = ("failure", traceback.format_exc())
        with os.fdopen(sink, "wb") as stream:
            pickle.dump(outcome, stream)
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


@contextlib.contextmanager
def child(action: Callable[[], T], user: User | None = None) -> Iterator[Child[T]]:
    """Run the function in a process beside the block; it is killed if the block did not join it."""
    process = Child(action, user)
    try:
        yield process
    finally:
        process.kill()


def as_user(user: User, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The function's result, run in a process with this user's ids."""
    with child(partial(action, *args, **kwargs), user) as process:
        return process.join()


def in_parallel(actions: Sequence[Callable[[], T]]) -> list[T]:
    """The results of functions that run at the same time, a process each."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(child(action)) for action in actions]
        return [process.join() for process in processes]


def write(path: str | bytes, data: bytes = b"", mode: int = 0o644) -> None:
    """Make or replace a regular file with these bytes and exactly this mode."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def read(path: str | bytes) -> bytes:
    """All bytes of a file."""
    with opened(path) as descriptor:
        return read_all(descriptor)


def read_all(descriptor: int) -> bytes:
    """All bytes from the descriptor's offset on."""
    chunks = []
    while chunk := os.read(descriptor, 1 << 20):
        chunks.append(chunk)
    return b"".join(chunks)


@contextlib.contextmanager
def opened(path: str | bytes, flags: int = os.O_RDONLY, mode: int = 0o644) -> Iterator[int]:
    """An open descriptor, closed when the block ends."""
    descriptor = os.open(path, flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def inside(path: str) -> Iterator[int]:
    """The block has this current directory; the one before is given as a descriptor, and comes back."""
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.chdir(path)
        yield before
    finally:
        os.fchdir(before)
        os.close(before)


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    """The block runs with this umask."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
