"""Two sides in step: whatever one shows, the other must show too."""

import ctypes
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final, NoReturn

from tests.differential.known import (
    ROOT_MARKS,
    accepted,
    better,
    undefined,
    with_needless_data,
    without_ghosts,
    without_needless_copies,
)
from tests.differential.script import SCRIPT, USERS, Result, Script, Stat, Step, User, show, written
from tests.differential.side import PROFILES, Mounter, Profile, Side, kernel, ours
from tests.support.caches import names_kept
from tests.support.mounts import MountFailed
from tests.support.trees import (
    Difference,
    Entry,
    Stack,
    Tree,
    abbreviated,
    compare_trees,
    error_name,
    read_xattrs,
    show_tree,
)

_SETGROUPS, _SETRESUID, _SETRESGID = {"x86_64": (116, 117, 119), "aarch64": (159, 147, 149)}[platform.machine()]
_syscall: Final = ctypes.CDLL(None, use_errno=True).syscall
_KEEP: Final = ctypes.c_uint32(0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference: at which stage and step, what it is, and what the first and the second side have.

    `signature` is the same for differences that probably have the same cause; `failed` are the steps that failed on
    both sides, without which the difference probably stays.
    """

    stage: str
    step: int
    first: str
    second: str
    signature: tuple[str, ...]
    failed: frozenset[int]


class Divergence(AssertionError):
    """The two sides differ."""

    def __init__(self, finding: Finding, report: str) -> None:
        super().__init__(report)
        self.finding = finding


class Pair:
    """The kernel's overlayfs and ours, mounted over equal layers below `base`; a context manager.

    `do` runs a step on both and `finish` compares all that is left on disk; both raise Divergence.
    """

    def __init__(self, profile: Profile, stack: Stack, base: Path, second: Mounter | None = None) -> None:
        since = time.time_ns()
        self.profile = profile
        self.compares_ours = second is None
        self.stack = stack
        self.done: list[Step] = []
        self.failed: set[int] = set()
        self.first = Side(base / "first", stack, kernel(profile.kernel_options), profile, since, stale_handles=True)
        self.second = Side(
            base / "second", stack, second or ours(profile.our_options), profile, since, stale_handles=False
        )
        self._at_exit = ExitStack()

    def __enter__(self) -> "Pair":
        with self._at_exit:
            for side in (self.first, self.second):
                side.mount()
                self._at_exit.callback(side.unmount)
            self._at_exit = self._at_exit.pop_all()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is None:
            self._at_exit.close()
        else:
            with suppress(MountFailed, OSError):
                self._at_exit.close()

    @property
    def script(self) -> Script:
        return Script(self.profile.name, self.stack, tuple(self.done))

    def do(self, step: Step) -> None:
        if undefined(self.first, step, self.profile):
            return
        self.done.append(step)
        # With an inode the kernel would forget the number of a copy that can't be marked, on one side or both.
        with names_kept():
            self._do(step)

    def _do(self, step: Step) -> None:
        before: list[dict[bytes, int]] = [{}, {}]
        if self.profile.keeps_inode_numbers:
            before = [_inodes(side, step) for side in (self.first, self.second)]
        results = _run(self.first, step), _run(self.second, step)
        name = type(step.op).__name__
        if results[0] != results[1] and not self._accepted(step, *results):
            kinds = _differing_keys(results[0], results[1])
            self._diverge("result", str(results[0]), str(results[1]), (name, *kinds))
        if results[0].error:
            self.failed.add(len(self.done) - 1)
        if step.look:
            looks = [_look(side, step, seen) for side, seen in zip((self.first, self.second), before, strict=True)]
            for path, seen in looks[0].items():
                if seen != looks[1][path] and not self._accepted(step, seen, looks[1][path]):
                    kinds = _differing_keys(seen, looks[1][path])
                    self._diverge("afterwards", f"{path!r}: {seen}", f"{path!r}: {looks[1][path]}", (name, *kinds))

    def _accepted(self, step: Step, first: Result, second: Result) -> bool:
        return accepted(self.first, step, first, second, self.profile)

    def check_visible(self) -> tuple[Tree, Tree]:
        trees = self._visible(self.first, self.first), self._visible(self.second, self.second)
        self._same_trees("visible tree", *trees)
        return trees

    def finish(self) -> None:
        """Compare the visible trees, the upper and work directories, and what each side makes of the other's."""
        first, second = self.check_visible()
        for side in (self.first, self.second):
            try:
                side.unmount()
            except MountFailed as error:
                self._diverge("unmount", "", str(error), ("unmount", side.name))
        one, other = (_upper_on_disk(side, self.profile.prefix) for side in (self.first, self.second))
        prefix, failures = self.profile.prefix, bool(self.failed)
        if failures:
            other = with_needless_data(other, one, prefix)
        fewer = (
            without_needless_copies(one, other, prefix, failures=failures),
            without_needless_copies(other, one, prefix, failures=failures),
        )
        if unmarked := [path for path in _parents_of_copies(other, prefix) if not _has(other[path], f"{prefix}impure")]:
            self._diverge("upper directory", "", f"holds copies but is not impure: {unmarked}", ("impure",))
        self._same_trees("upper directory", *fewer, ignore=("atime",))
        indexes = [_index_on_disk(side, self.profile.prefix) for side in (self.first, self.second)]
        only_first, only_second = ((Counter(a) - Counter(b)) for a, b in (indexes, indexes[::-1]))
        if only_second or (only_first and not failures):
            self._diverge("index", "\n".join(indexes[0]), "\n".join(indexes[1]), ("index",))
        for side in (self.first, self.second):
            if rubbish := _left_in_workdir(side):
                self._diverge("workdir", "", f"{side.work!r} holds {rubbish}", ("workdir",))
            for before, now in side.lowers_before_and_now():
                self._same_trees(f"lower layers of {side.name}, before and after", before, now)
        self._same_trees("first upper, mounted by the second", first, self._crossed(self.first, self.second))
        self._same_trees("second upper, mounted by the first", second, self._crossed(self.second, self.first))

    def _visible(self, side: Side, by: Side) -> Tree:
        """What is seen in the mount on `side` that `by` has made."""
        tree = side.visible()
        return tree if by is self.second and self.compares_ours else without_ghosts(tree)

    def _crossed(self, side: Side, by: Side) -> Tree:
        try:
            side.mount(by.mounter)
        except (MountFailed, OSError) as error:
            self._diverge(f"{side.name} upper, mounted by the other", "a mount", str(error), ("crossed",))
        try:
            return self._visible(side, by)
        finally:
            side.unmount()

    def _same_trees(self, stage: str, one: Tree, other: Tree, ignore: tuple[str, ...] = ()) -> None:
        prefix, metacopy = self.profile.prefix, self.profile.metacopy
        found = compare_trees(one, other, ignore if self.profile.atimes else (*ignore, "atime"))
        differences = [
            each for each in found if not better(each, prefix, metacopy=metacopy, failures=bool(self.failed))
        ]
        if differences:
            lines = [_show_difference(difference) for difference in differences[:40]]
            first = "\n".join([*lines, "", "first tree:", show_tree(one)])
            second = "\n".join(["second tree:", show_tree(other)])
            kinds = sorted({f"{difference.field} {_xattr_names(difference)}".strip() for difference in differences})
            self._diverge(stage, first, second, (stage, *kinds))

    def _diverge(self, stage: str, first: str, second: str, signature: tuple[str, ...]) -> NoReturn:
        if log := self.second.log():
            second += f"\n\ndaemon log:\n{log}"
        finding = Finding(stage, len(self.done) - 1, first, second, (stage, *signature), frozenset(self.failed))
        raise Divergence(finding, report(self.script, finding))


def report(script: Script, finding: Finding) -> str:
    """A finding with the script that shows it."""
    last = f"after step {finding.step}: {written(script.steps[finding.step])}" if script.steps else "before any step"
    return (
        f"{finding.stage} differs {last}\n\n--- first (the kernel) ---\n{finding.first}\n\n"
        f"--- second (ours) ---\n{finding.second}\n\n{SCRIPT}{show(script)}"
    )


def run(script: Script, base: Path, second: Mounter | None = None, *, steps_only: bool = False) -> Finding | None:
    """Run a whole script and return what differs first, if anything does; with `steps_only`, during the steps."""
    try:
        with Pair(PROFILES[script.profile], script.stack, base, second=second) as pair:
            for step in script.steps:
                pair.do(step)
            if not steps_only:
                pair.finish()
    except Divergence as divergence:
        return divergence.finding
    return None


@contextmanager
def acting_as(user: User) -> Iterator[None]:
    """This thread alone has the user's ids and, unless it is root, no capabilities."""
    if user.uid == 0:
        yield
        return
    _become(_SETGROUPS, len(user.groups), (ctypes.c_uint32 * len(user.groups))(*user.groups))
    _become(_SETRESGID, _KEEP, ctypes.c_uint32(user.gid), _KEEP)
    _become(_SETRESUID, _KEEP, ctypes.c_uint32(user.uid), _KEEP)
    try:
        yield
    finally:
        _become(_SETRESUID, _KEEP, ctypes.c_uint32(0), _KEEP)
        _become(_SETRESGID, _KEEP, ctypes.c_uint32(0), _KEEP)
        _become(_SETGROUPS, 1, (ctypes.c_uint32 * 1)(0))


def _become(number: int, *arguments: object) -> None:
    if _syscall(ctypes.c_long(number), *arguments) != 0:
        raise OSError(ctypes.get_errno(), "cannot change ids")


def _run(side: Side, step: Step) -> Result:
    try:
        with acting_as(USERS[step.who]):
            return Result("", step.op.run(side))
    except OSError as error:
        return Result(error_name(error))
    except MountFailed as error:
        return Result(f"MountFailed: {error}")


def _inodes(side: Side, step: Step) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    if step.look:
        for path in step.op.paths:
            with suppress(OSError):
                found[path] = os.lstat(side.at(path)).st_ino
    return found


def _look(side: Side, step: Step, before: dict[bytes, int]) -> dict[bytes, Result]:
    """What can be seen of the paths of a step and of their parents, and which had had those inode numbers before."""
    seen: dict[bytes, Result] = {}
    for path in step.op.paths:
        for looked in (path, os.path.dirname(path)):
            try:
                value = Stat(looked).run(side)
                assert isinstance(value, dict)
                number = os.lstat(side.at(looked)).st_ino
                value["inode number of"] = sorted(other for other, inode in before.items() if inode == number)
                value["xattrs"] = read_xattrs(side.at(looked))
                seen[looked] = Result("", value)
            except OSError as error:
                seen[looked] = Result(error_name(error))
    return seen


def _differing_keys(one: Result, other: Result) -> tuple[str, ...]:
    if isinstance(one.value, dict) and isinstance(other.value, dict):
        return tuple(sorted(key for key in one.value if one.value[key] != other.value.get(key)))
    return (one.error or "success", other.error or "success")


def _upper_on_disk(side: Side, prefix: str) -> Tree:
    tree = side.on_disk(side.upper)
    root = tree[b"."]
    shown = tuple((name, value) for name, value in root.xattrs if name.removeprefix(prefix) not in ROOT_MARKS)
    tree[b"."] = replace(root, xattrs=shown)
    return {path: _comparable(entry, prefix) for path, entry in tree.items()}


def _parents_of_copies(tree: Tree, prefix: str) -> set[bytes]:
    return {os.path.dirname(path) or b"." for path, entry in tree.items() if _has(entry, f"{prefix}origin")} - {b""}


def _has(entry: Entry, xattr: str) -> bool:
    return any(name == xattr for name, _ in entry.xattrs)


def _comparable(entry: Entry, prefix: str) -> Entry:
    """Without what may differ: all of a whiteout but its being one, and how origins, counts and redirects are noted.

    Each upper is mounted by the other side, too, which tells whether they mean the same.
    """
    if entry.kind == "whiteout":
        return Entry("whiteout")
    unsure = (f"{prefix}origin", f"{prefix}nlink", f"{prefix}redirect")
    xattrs = tuple((name, b"(present)" if name in unsure else value) for name, value in entry.xattrs)
    if entry.kind == "file" and not (entry.size and _has(entry, f"{prefix}metacopy")):
        # The kernel makes metacopies of empty files, too, and leaves a redirect when it has copied the data up.
        needless = (f"{prefix}metacopy", f"{prefix}redirect")
        xattrs = tuple(item for item in xattrs if item[0] not in needless)
    if (f"{prefix}nlink", b"(present)") in xattrs:
        # The visible trees tell the link count; how many of the names are in the upper directory may differ.
        return replace(entry, xattrs=xattrs, nlink=0, group=b"")
    return replace(entry, xattrs=xattrs)


def _index_on_disk(side: Side, prefix: str) -> list[str]:
    """What the index holds, without the names, which are the bytes of file handles."""
    directory = os.path.join(side.work, b"index")
    if not os.path.isdir(directory):
        return []
    tree = side.on_disk(directory)
    # The kernel keeps the whiteout it links again and again in the index.
    entries = [_comparable(entry, prefix) for entry in tree.values() if entry.kind not in ("dir", "whiteout")]
    ignored = ("group", "atime", "mtime", "sparse")
    return sorted(
        str({field.name: getattr(entry, field.name) for field in fields(entry) if field.name not in ignored})
        for entry in entries
    )


def _left_in_workdir(side: Side) -> list[bytes]:
    """Unfinished business of the workdir; a whiteout kept to be linked again is none."""
    tree = side.on_disk(side.work)
    fixed = (b".", b"work", b"index")
    return [
        path
        for path, entry in tree.items()
        if path not in fixed and entry.kind != "whiteout" and not path.startswith(b"index/")
    ]


def _xattr_names(difference: Difference) -> str:
    if difference.field != "xattrs":
        return ""
    assert isinstance(difference.left, tuple) and isinstance(difference.right, tuple)
    return " ".join(sorted({name for name, _ in set(difference.left) ^ set(difference.right)}))


def _show_difference(difference: Difference) -> str:
    return f"{abbreviated(difference.path)} {difference.field}: {difference.left!r} | {difference.right!r}"
