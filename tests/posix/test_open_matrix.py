"""open with every set of flags, on every type of file, by root and by others; each twice, so also after a copy-up."""

import errno
import itertools
import os

import pytest

from tests.posix.rig import OTHER, ROOT, Root, User, as_user, opened, prepared, read, write

TARGETS = (
    "file",
    "empty",
    "link-to-file",
    "link-to-link",
    "directory",
    "full-directory",
    "link-to-directory",
    "missing",
    "dangling-link",
    "dangling-link-to-link",
    "removed",
)
MODIFIERS = (os.O_APPEND, os.O_CREAT, os.O_EXCL, os.O_TRUNC)
ACCESS = {"ro": os.O_RDONLY, "wo": os.O_WRONLY, "rw": os.O_RDWR}
OLD = b":xxx:yyy:zzz"


def combinations() -> list[int]:
    """Every set of modifiers whose outcome is defined: O_EXCL goes with O_CREAT (open(2))."""
    sets = itertools.chain.from_iterable(itertools.combinations(MODIFIERS, count) for count in range(5))
    return [flags for chosen in sets if not (flags := sum(chosen)) & os.O_EXCL or flags & os.O_CREAT]


def build(target: str) -> None:
    os.chmod(".", 0o777)
    for flags in combinations():
        build_one(target, f"t{flags}")


def build_one(target: str, name: str) -> None:
    real = f"{name}.real"
    if target in ("file", "link-to-file", "link-to-link", "removed"):
        write(real, OLD, 0o666)
    elif target == "empty":
        write(real, b"", 0o666)
    elif "directory" in target:
        os.mkdir(real)
        os.chmod(real, 0o777)
        if target == "full-directory":
            write(f"{real}/f", OLD)
    if target.endswith("link-to-link"):
        os.symlink(real, f"{name}.middle")
        os.symlink(f"{name}.middle", name)
    elif "link" in target:
        os.symlink(real, name)
    elif target != "missing":
        os.rename(real, name)


def expected(target: str, flags: int) -> int:
    """The error number that open must give, 0 for success."""
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    if target in ("missing", "removed") or "dangling" in target:
        if not flags & os.O_CREAT:
            return errno.ENOENT
        return errno.EEXIST if flags & os.O_EXCL and "dangling" in target else 0
    if flags & os.O_CREAT and flags & os.O_EXCL:
        return errno.EEXIST
    if "directory" in target and (writes or flags & (os.O_CREAT | os.O_TRUNC)):
        return errno.EISDIR
    return 0


def try_open(name: str, flags: int, text: bytes) -> tuple[int, bytes]:
    """Open and use a file: the error number and the bytes read."""
    seen = b""
    try:
        with opened(name, flags, 0o666) as descriptor:
            if os.path.isdir(name):
                return 0, b""
            if flags & os.O_ACCMODE != os.O_WRONLY:
                seen = os.read(descriptor, 100)
            if flags & os.O_ACCMODE != os.O_RDONLY:
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, text)
    except OSError as error:
        return error.errno or -1, seen
    return 0, seen


@pytest.mark.parametrize("user", [ROOT, OTHER], ids=["by-root", "by-other"])
@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize("target", TARGETS)
@prepared(build)
def test_open_with_every_set_of_flags(root: Root, target: str, access: str, user: User) -> None:
    def run() -> list[str]:
        return [problem for flags in combinations() for problem in run_one(target, f"t{flags}", flags | ACCESS[access])]

    if target == "removed":
        for flags in combinations():
            os.unlink(f"t{flags}")
    problems = run() if user == ROOT else as_user(user, run)
    assert not problems, "\n".join(problems)


def run_one(target: str, name: str, flags: int) -> list[str]:
    """Open twice and compare with a model: error, bytes read, bytes left."""
    problems = []
    content = OLD if target in ("file", "link-to-file", "link-to-link") else b""
    inode = os.stat(name).st_ino if os.path.exists(name) else None
    for turn, text in enumerate((b"first", b"-second-")):
        known = target if turn == 0 or os.path.isdir(name) or not os.path.exists(name) else "file"
        if known == "file" and os.path.islink(name):
            known = "link-to-file"
        wanted = expected(known, flags)
        number, seen = try_open(name, flags, text)
        if wanted == 0 and "directory" not in target:
            if flags & os.O_TRUNC:
                content = b""
            wanted_seen = content if flags & os.O_ACCMODE != os.O_WRONLY else b""
            if flags & os.O_ACCMODE != os.O_RDONLY:
                content = content + text if flags & os.O_APPEND else text + content[len(text) :]
        else:
            wanted_seen = b""
        if (number, seen) != (wanted, wanted_seen):
            problems.append(f"{name} {flags:#o} turn {turn}: {(number, seen)}, expected {(wanted, wanted_seen)}")
    if os.path.isfile(name) and read(name) != content:
        problems.append(f"{name} {flags:#o}: holds {read(name)!r}, expected {content!r}")
    if inode is not None and os.stat(name).st_ino != inode:
        problems.append(f"{name} {flags:#o}: another inode number")
    return problems
