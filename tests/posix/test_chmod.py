"""chmod, fchmod and what clears the setuid and setgid bits."""

import errno
import mmap
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.files import NOT_DIRECTORIES, NOT_SYMLINKS, TYPES, make
from tests.posix.rig import BY_ROLE, MEMBER, OTHER, OWNER, ROOT, Root, User, as_user, fails, opened, prepared, write

MODES = (0o0000, 0o0111, 0o0444, 0o0644, 0o0777, 0o1777, 0o2755, 0o4755, 0o6755, 0o7777)


def mode_of(path: str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def build_file(kind: str) -> None:
    make(kind, "f")
    os.symlink("f", "link")


@pytest.mark.parametrize("kind", NOT_SYMLINKS)
@prepared(build_file)
def test_chmod_sets_every_bit_of_the_mode(root: Root, kind: str) -> None:
    before = os.lstat("f")
    for mode in MODES:
        os.chmod("f", mode)
        assert mode_of("f") == mode
    after = os.lstat("f")
    assert (after.st_ino, after.st_size, after.st_rdev) == (before.st_ino, before.st_size, before.st_rdev)


@pytest.mark.parametrize("kind", NOT_SYMLINKS)
@prepared(build_file)
def test_chmod_advances_the_ctime_alone(root: Root, kind: str) -> None:
    with root.touches(f="c", here="", link=""):
        os.chmod("f", 0o600)


@pytest.mark.parametrize("kind", NOT_SYMLINKS)
@prepared(build_file)
def test_chmod_follows_a_link(root: Root, kind: str) -> None:
    with root.touches(f="c", link=""):
        os.chmod("link", 0o611)
    assert mode_of("f") == 0o611
    assert mode_of("link") == 0o777


def build_owned(kind: str) -> None:
    make(kind, "f")
    os.chown("f", OWNER.uid, OWNER.gid, follow_symlinks=False)


@pytest.mark.parametrize("kind", NOT_SYMLINKS)
@prepared(build_owned)
def test_only_the_owner_and_root_change_the_mode(root: Root, kind: str) -> None:
    as_user(OWNER, os.chmod, "f", 0o640)
    assert mode_of("f") == 0o640
    for user in (MEMBER, OTHER):
        with root.touches(f=""), fails(errno.EPERM):
            as_user(user, os.chmod, "f", 0o666)
    assert mode_of("f") == 0o640
    as_user(ROOT, os.chmod, "f", 0o604)
    assert mode_of("f") == 0o604


@pytest.mark.parametrize("kind", NOT_SYMLINKS)
@prepared(build_owned)
def test_chmod_by_someone_outside_the_group_loses_the_setgid_bit(root: Root, kind: str) -> None:
    os.chown("f", OWNER.uid, OTHER.gid)
    as_user(OWNER, os.chmod, "f", 0o2755)
    assert mode_of("f") == 0o755
    os.chown("f", MEMBER.uid, MEMBER.groups[0])
    as_user(MEMBER, os.chmod, "f", 0o2755)
    assert mode_of("f") == 0o2755
    os.chown("f", OWNER.uid, OTHER.gid)
    os.chmod("f", 0o2755)
    assert mode_of("f") == 0o2755


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_owned)
def test_anyone_may_set_the_sticky_bit_of_their_file(root: Root, kind: str) -> None:
    if kind == "symlink":
        with fails(errno.ENOENT):
            os.chmod("f", 0o1644)
        return
    as_user(OWNER, os.chmod, "f", 0o1644)
    assert mode_of("f") == 0o1644


def build_regular() -> None:
    write("f", b"data")


@prepared(build_regular)
def test_fchmod_works_on_a_read_only_descriptor(root: Root) -> None:
    with opened("f") as descriptor:
        with root.touches(f="c", here=""):
            os.fchmod(descriptor, 0o4711)
        assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o4711
        assert mode_of("f") == 0o4711
    with opened("f", os.O_PATH) as descriptor, fails(errno.EBADF):
        os.fchmod(descriptor, 0o600)


@prepared(build_regular)
def test_an_open_file_stays_usable_when_its_mode_forbids_it(root: Root) -> None:
    os.chown("f", OWNER.uid, OWNER.gid)

    def use() -> bytes:
        with opened("f", os.O_RDWR) as descriptor:
            os.chmod("f", 0)
            with fails(errno.EACCES):
                os.open("f", os.O_RDONLY)
            os.pwrite(descriptor, b"DA", 0)
            os.ftruncate(descriptor, 3)
            return os.pread(descriptor, 10, 0)

    assert as_user(OWNER, use) == b"DAt"


def build_privileged(special: int) -> None:
    write("f", b"data", 0o777 | special)
    os.chown("f", OWNER.uid, OWNER.gid)
    os.chmod("f", 0o777 | special)


def change_by_write(path: str) -> None:
    with opened(path, os.O_WRONLY) as descriptor:
        os.write(descriptor, b"x")


def change_by_append(path: str) -> None:
    with opened(path, os.O_WRONLY | os.O_APPEND) as descriptor:
        os.write(descriptor, b"x")


def change_by_pwritev(path: str) -> None:
    with opened(path, os.O_WRONLY) as descriptor:
        os.pwritev(descriptor, [b"x", b"y"], 10)


def change_by_truncate(path: str) -> None:
    os.truncate(path, 2)


def change_by_ftruncate(path: str) -> None:
    with opened(path, os.O_WRONLY) as descriptor:
        os.ftruncate(descriptor, 2)


def change_by_open(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))


def change_by_direct_write(path: str) -> None:
    with opened(path, os.O_WRONLY | os.O_DIRECT) as descriptor, mmap.mmap(-1, 4096) as buffer:
        os.pwritev(descriptor, [buffer], 0)


def change_by_copying(path: str) -> None:
    with opened(path) as source, opened(path, os.O_WRONLY) as target:
        assert os.copy_file_range(source, target, 2, 0, 10) == 2


CHANGES = {
    "write": change_by_write,
    "append": change_by_append,
    "pwritev": change_by_pwritev,
    "direct-write": change_by_direct_write,
    "copy_file_range": change_by_copying,
    "truncate": change_by_truncate,
    "ftruncate": change_by_ftruncate,
    "open-truncating": change_by_open,
}


@pytest.mark.parametrize("special", [0o6000, 0o4000, 0o2000], ids=oct)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("role", BY_ROLE)
@prepared(build_privileged)
def test_changing_a_program_clears_setuid_and_setgid(root: Root, role: str, change: str, special: int) -> None:
    as_user(BY_ROLE[role], lambda: CHANGES[change]("f"))
    assert mode_of("f") == 0o777


def build_program() -> None:
    write("f", Path("/usr/bin/id").read_bytes())
    os.chown("f", OWNER.uid, OWNER.gid)
    os.chmod("f", 0o6777)


def change_by_writing_the_same(path: str) -> None:
    with opened(path, os.O_RDWR) as descriptor:
        os.pwrite(descriptor, os.pread(descriptor, 16, 0), 0)


def change_by_allocating(path: str) -> None:
    with opened(path, os.O_RDWR) as descriptor:
        os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size + 10)


def change_by_copying_to_the_end(path: str) -> None:
    with opened(path) as source, opened(path, os.O_WRONLY) as target:
        assert os.copy_file_range(source, target, 16, 0, os.fstat(target).st_size) == 16


@pytest.mark.parametrize(
    "change",
    [change_by_append, change_by_writing_the_same, change_by_allocating, change_by_copying_to_the_end],
    ids=lambda change: change.__name__,
)
@prepared(build_program)
def test_a_changed_program_runs_without_privilege_even_if_nobody_has_looked_since(
    root: Root, change: Callable[[str], None]
) -> None:
    assert mode_of("f") == 0o6777

    def change_and_run() -> list[bytes]:
        change("f")
        return [subprocess.run(["./f", option], stdout=subprocess.PIPE, check=True).stdout for option in ("-u", "-g")]

    assert as_user(OTHER, change_and_run) == [b"%d\n" % OTHER.uid, b"%d\n" % OTHER.gid]


@pytest.mark.parametrize("special", [0o6000], ids=oct)
@pytest.mark.parametrize("change", CHANGES)
@prepared(build_privileged)
def test_root_changes_a_program_without_clearing_anything(root: Root, change: str, special: int) -> None:
    CHANGES[change]("f")
    assert mode_of("f") == 0o777 | special


def build_marked_for_locking() -> None:
    write("f", b"data", 0o2666)
    os.chown("f", OWNER.uid, OWNER.gid)
    os.chmod("f", 0o2666)


@pytest.mark.parametrize("change", CHANGES)
@prepared(build_marked_for_locking)
def test_a_setgid_bit_without_group_execution_stays_for_members(root: Root, change: str) -> None:
    as_user(MEMBER, lambda: CHANGES[change]("f"))
    assert mode_of("f") == 0o2666


@pytest.mark.parametrize("change", CHANGES)
@prepared(build_marked_for_locking)
def test_a_setgid_bit_without_group_execution_goes_when_others_change_the_file(root: Root, change: str) -> None:
    as_user(OTHER, lambda: CHANGES[change]("f"))
    assert mode_of("f") == (0o2666 if root.traits.locking_bit_stays else 0o666)


@pytest.mark.parametrize("special", [0o6000], ids=oct)
@prepared(build_privileged)
def test_reading_and_failing_to_write_clear_nothing(root: Root, special: int) -> None:
    def use() -> None:
        with opened("f") as descriptor:
            os.read(descriptor, 10)
            with fails(errno.EBADF):
                os.write(descriptor, b"x")
        with opened("f", os.O_WRONLY) as descriptor:
            os.write(descriptor, b"")

    as_user(OTHER, use)
    assert mode_of("f") == 0o777 | special


# Whom chown clears the bits for: everyone, on Linux, also where the ids stay (chown(2), notes).
@pytest.mark.parametrize("user", [ROOT, OWNER], ids=["root", "owner"])
@pytest.mark.parametrize("ids", [(-1, OWNER.gid), (OWNER.uid, -1), (OWNER.uid, OWNER.gid), (-1, -1)], ids=str)
@pytest.mark.parametrize("special", [0o6000], ids=oct)
@prepared(build_privileged)
def test_chown_of_a_program_clears_setuid_and_setgid(
    root: Root, user: User, ids: tuple[int, int], special: int
) -> None:
    as_user(user, os.chown, "f", *ids)
    assert mode_of("f") == 0o777


@prepared(build_marked_for_locking)
def test_chown_leaves_a_setgid_bit_without_group_execution(root: Root) -> None:
    as_user(OWNER, os.chown, "f", -1, OWNER.gid)
    assert mode_of("f") == 0o2666


def build_special_nodes() -> None:
    for kind in NOT_DIRECTORIES:
        if kind != "symlink":
            make(kind, kind)
            os.chmod(kind, 0o6755)
    os.mkdir("directory")
    os.chmod("directory", 0o7755)


@pytest.mark.parametrize("ids", [(OWNER.uid, OWNER.gid), (-1, -1)], ids=str)
@prepared(build_special_nodes)
def test_chown_clears_the_bits_of_all_but_directories(root: Root, ids: tuple[int, int]) -> None:
    for kind in NOT_SYMLINKS:
        os.chown(kind, *ids)
        assert mode_of(kind) == (0o7755 if kind == "directory" else 0o755)


def build_truncation_pair() -> None:
    for name in ("shrink", "same", "grow"):
        write(name, b"data", 0o6777)
        os.chown(name, OWNER.uid, OWNER.gid)
        os.chmod(name, 0o6777)


@prepared(build_truncation_pair)
def test_truncating_clears_the_bits_whatever_the_size(root: Root) -> None:
    for name, size in (("shrink", 1), ("same", 4), ("grow", 100)):
        as_user(OTHER, os.truncate, name, size)
        assert mode_of(name) == 0o777
