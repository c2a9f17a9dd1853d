"""Whatever system call of an operation fails, the tree is as it was before, and the next attempt succeeds."""

import contextlib
import errno
import logging
import os
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from overlayfs_py.core.overlay import Overlay
from overlayfs_py.sys import mounts
from tests.core.rig import Rig, Seen, Tree, configure, differences
from tests.faults.calls import Calls, Crash, replaced
from tests.faults.cases import CASES, LESSER_CASES, REFUSED_CASES, Case, build_lowers
from tests.support import trees
from tests.support.syscalls import MS_NOATIME, mount, umount

ALL_ERRORS = bool(os.environ.get("OVERLAYFS_PY_ALL_FAULTS"))
"""Whether every error is tried with every call; in each run there is time for one."""


@dataclass(slots=True)
class Bench:
    """Lower layers that stay the same, and a place for one upper layer at a time."""

    base: Path
    lowers: list[Path]
    calls: Calls
    cache: dict[tuple[int, bytes, int], Seen] = field(default_factory=dict)

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """A new upper layer; gone at the end."""
        for name in ("upper", "work"):
            (self.base / name).mkdir()
        os.utime(self.base / "upper", (10**9, 10**9))
        try:
            yield
        finally:
            for name in ("upper", "work"):
                shutil.rmtree(self.base / name)

    @contextlib.contextmanager
    def opened(self, case: Case) -> Iterator[Rig]:
        fs = Overlay.open(configure(self.lowers, self.base / "upper", self.base / "work", **case.options))
        try:
            assert fs.work is not None
            fs.work.whiteouts = case.whiteouts
            fs.work.tmpfiles = case.tmpfiles
            fs.work.rename_whiteout = case.rename_whiteout
            yield Rig(fs)
        finally:
            fs.close()

    def tree(self, rig: Rig) -> Tree:
        return recent_as_zero(rig.tree(self.cache))

    def look(self, case: Case) -> Tree:
        """What another mount of the layers shows."""
        with self.opened(case) as rig:
            return self.tree(rig)

    def remount(self, case: Case) -> tuple[Tree, list[str]]:
        """As `look`, when no mount is left; also what the mount has not cleaned up."""
        with self.opened(case) as rig:
            tree = self.tree(rig)
            used = {node.upper.name for node in rig.fs.nodes.by_id.values() if node.indexed and node.upper}
            wrong = [f"the work directory still holds {name}" for name in self.leftovers()]
            if rig.fs.index is not None:
                indexed = os.listdir(os.fsencode(self.base / "work/index"))
                wrong += [f"no name leads to the index's {name!r}" for name in indexed if name not in used]
        return tree, wrong

    def leftovers(self) -> list[str]:
        return os.listdir(self.base / "work/work")


def recent_as_zero(tree: Tree) -> Tree:
    """Times of this run can't be foreseen."""
    return {path: seen._replace(mtime_ns=0) if seen.mtime_ns > START else seen for path, seen in tree.items()}


@contextlib.contextmanager
def private_mounts_refused() -> Iterator[None]:
    """Without the read-only mounts that guard lower layers; making and leaving them takes longest, besides."""

    def refuse(fd: int, *, read_only: bool, flags: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with replaced(mounts, "clone_mount", refuse):
        yield


START = time.time_ns() - 10**10


@pytest.fixture(scope="module")
def bench(scratch: Path) -> Iterator[Bench]:
    base = scratch / "faults"
    base.mkdir()
    mount(b"tmpfs", os.fsencode(base), b"tmpfs", MS_NOATIME, b"size=128m,mode=755")
    umask = os.umask(0o022)
    logging.disable(logging.WARNING)
    try:
        lowers = build_lowers(base)
        before = [trees.read_tree(os.fsencode(lower), 0) for lower in lowers]
        with Calls().installed() as calls, private_mounts_refused():
            yield Bench(base, lowers, calls)
        after = [trees.read_tree(os.fsencode(lower), 0) for lower in lowers]
        assert before == after, "a lower layer has changed"
    finally:
        logging.disable(logging.NOTSET)
        os.umask(umask)
        umount(os.fsencode(base))
        base.rmdir()


@dataclass(frozen=True, slots=True)
class Plain:
    """An undisturbed run: the trees before and after, the calls made."""

    before: Tree
    after: Tree
    names: list[str]
    changing: list[bool]


def undisturbed(bench: Bench, case: Case) -> Plain:
    with bench.fresh():
        with bench.opened(case) as rig:
            case.setup(rig)
            before = bench.tree(rig)
        with bench.opened(case) as rig:
            with bench.calls.watched():
                case.act(rig)
            names, changing = bench.calls.names, bench.calls.changing
            after = bench.tree(rig)
            assert bench.leftovers() == []
        again, wrong = bench.remount(case)
        wrong += compared("the next mount", after, again)
        assert not wrong, "\n".join(wrong)
    return Plain(before, after, names, changing)


def compared(who: str, expected: Tree, shown: Tree, timeless: Collection[int] = ()) -> list[str]:
    return [f"{who} shows (expected first) {line}" for line in differences(expected, shown, timeless=timeless)]


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def attempt(bench: Bench, case: Case, plain: Plain, n: int, number: int) -> list[str]:
    """What is wrong after the n-th call has failed: nothing, it is hoped."""
    open_before = descriptors()
    with bench.fresh():
        with bench.opened(case) as rig:
            case.setup(rig)
        with bench.opened(case) as rig:
            error = None
            with bench.calls.watched(fail_at=n, number=number):
                try:
                    case.act(rig)
                except OSError as raised:
                    error = raised
            done = error is None or after_the_change(plain, n)
            # The times of a directory whose content is replaced by its equal are kept as far as that is possible.
            timeless = {stat.S_IFDIR} if plain.names[n - 1] == "_utimensat" else set()
            expected = plain.after if done else plain.before
            shown = bench.tree(rig)
            if error is not None and done and not differences(plain.before, shown, timeless={stat.S_IFDIR}):
                done, timeless, expected = False, {stat.S_IFDIR}, plain.before
            wrong = compared("the mount", expected, shown, timeless)
            if error is not None:
                wrong += [f"left in the work directory: {name}" for name in bench.leftovers()]
                if error.errno != number:
                    wrong.append(f"another error was reported: {error}")
            if not wrong and plain.changing[n - 1]:
                wrong = compared("another mount", expected, bench.look(case), timeless)
            if not done and not wrong:
                case.act(rig)
                wrong = compared("after another attempt the mount", plain.after, bench.tree(rig))
        # What went wrong before anything was changed was made good by the other attempt.
        if not wrong and any(plain.changing[:n]):
            shown, wrong = bench.remount(case)
            wrong += compared("the next mount", plain.after, shown, timeless)
        wrong += [f"descriptor left open: {fd}" for fd in descriptors() - open_before]
    if wrong:
        outcome = "reported" if error else "forgiven"
        wrong.insert(0, f"call {n}, {plain.names[n - 1]}, fails with {errno.errorcode[number]}, which is {outcome}:")
    return wrong


def after_the_change(plain: Plain, n: int) -> bool:
    """Whether call n only asks for what the operation is to answer, when all of it is done."""
    return not any(plain.changing[n - 1 :])


def every_failure(bench: Bench, case: Case, *, reading: bool) -> list[str]:
    """Try all calls; those that only read only with `reading`, and with EIO, the one error they have."""
    plain = undisturbed(bench, case)
    wrong = []
    for n, changing in enumerate(plain.changing, 1):
        if changing:
            for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT) if ALL_ERRORS else (errno.ENOSPC,):
                wrong += attempt(bench, case, plain, n, number)
        elif reading:
            wrong += attempt(bench, case, plain, n, errno.EIO)
    return wrong


def crash(bench: Bench, case: Case, plain: Plain, n: int) -> list[str]:
    """What is wrong when the process has ended instead of making the n-th of its calls that change something."""
    open_before = descriptors()
    with bench.fresh():
        with bench.opened(case) as rig:
            case.setup(rig)
        with bench.opened(case) as rig, bench.calls.watched(fail_at=n, crash=True), contextlib.suppress(Crash):
            case.act(rig)
        for left in descriptors() - open_before:
            # /proc/self/fd lists the descriptor it is read through, which is closed by now.
            with contextlib.suppress(OSError):
                os.close(int(left))
        shown, wrong = bench.remount(case)
        # When a directory was changed is told before it is, or after. The times of files stay, but for metacopies,
        # which get their data in place.
        timeless = {stat.S_IFDIR, stat.S_IFREG} if case.options.get("metacopy") else {stat.S_IFDIR}
        if all(differences(tree, shown, timeless=timeless) for tree in (plain.before, plain.after)):
            wrong += compared("instead of the tree before, the next mount", plain.before, shown)
            wrong += compared("instead of the tree after, the next mount", plain.after, shown)
    return [f"crash at change {n}", *wrong] if wrong else []


def every_crash(bench: Bench, case: Case) -> list[str]:
    plain = undisturbed(bench, case)
    return [line for n in range(1, sum(plain.changing) + 1) for line in crash(bench, case, plain, n)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_failing_system_call_changes_nothing(bench: Bench, case: Case) -> None:
    wrong = every_failure(bench, case, reading=True)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("case", LESSER_CASES, ids=str)
def test_a_failing_system_call_changes_nothing_on_lesser_filesystems(bench: Bench, case: Case) -> None:
    wrong = every_failure(bench, case, reading=ALL_ERRORS)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("case", CASES + LESSER_CASES, ids=str)
def test_a_crash_at_any_change_leaves_the_tree_before_or_after(bench: Bench, case: Case) -> None:
    wrong = every_crash(bench, case)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("case", REFUSED_CASES, ids=str)
def test_a_merged_directory_replaces_another_in_one_step_or_not_at_all(bench: Bench, case: Case) -> None:
    with bench.fresh():
        with bench.opened(case) as rig:
            case.setup(rig)
            before = bench.tree(rig)
            with pytest.raises(OSError) as raised:
                case.act(rig)
            assert raised.value.errno == errno.EXDEV
            assert not differences(before, bench.tree(rig))
