"""Copies made in advance, where one file of a directory after the other is copied up: never other than the original."""

import errno
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from overlayfs_py.core.drafts import Drafts
from overlayfs_py.core.work import Work
from overlayfs_py.sys import files
from overlayfs_py.sys.syncing import Syncs
from tests.core.conftest import Maker
from tests.core.rig import Rig
from tests.core.test_jobs import Started, start_write
from tests.support.trees import Node

COUNT = 60
NAMES = [b"f%02d" % number for number in range(COUNT)]


def data_of(name: bytes) -> bytes:
    return name * (10 + 50 * int(name[1:]))


LOWER = tuple(
    Node(b"d/" + name, data=data_of(name), mode=0o640, uid=5, gid=6, xattrs=(("user.k", name),)) for name in NAMES
)


class Disk:
    """What is asked of the disk: which files are synced, how many at once, and that each is before it gets a name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: set[int] = set()
        self.waits: list[int] = []
        self.has_to = True
        # Errors of the syncs to come, by place in them.
        self.errors: dict[int, int] = {}
        fsync, sync, link = os.fsync, Syncs.sync, files.link_fd

        def note(fds: Sequence[int]) -> None:
            self.waits.append(len(fds))
            self.synced |= {os.fstat(fd).st_ino for fd in fds}

        def one(fd: int) -> None:
            note([fd])
            fsync(fd)

        def many(syncs: Syncs, fds: Sequence[int]) -> list[OSError | None]:
            outcome = sync(syncs, fds)
            for index, number in self.errors.items():
                if index < len(fds):
                    outcome[index] = OSError(number, os.strerror(number))
            note([fd for fd, error in zip(fds, outcome, strict=True) if error is None])
            return outcome

        def give_name(fd: int, dir_fd: int, name: bytes) -> None:
            st = os.fstat(fd)
            assert st.st_ino in self.synced or not (st.st_size and self.has_to)
            link(fd, dir_fd, name)

        monkeypatch.setattr(os, "fsync", one)
        monkeypatch.setattr(Syncs, "sync", many)
        monkeypatch.setattr(files, "link_fd", give_name)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def listed(make: Maker, **options: Any) -> Rig:
    """An overlay whose nodes are known in the order of their names."""
    rig = make(LOWER, **options)
    for name in NAMES:
        rig.node(b"d/" + name)
    return rig


def drafts(rig: Rig) -> set[bytes]:
    return {node.name for node in rig.fs.drafts.ready}


def begin(rig: Rig, count: int = 4) -> None:
    """Change the first files, so that there are drafts of others."""
    for name in NAMES[:count]:
        rig.change(b"d/" + name, uid=77)
    assert NAMES[count] in drafts(rig)


def is_right(rig: Rig, name: bytes, uid: int = 77, data: bytes | None = None) -> None:
    attr = rig.attr(b"d/" + name)
    assert (attr.uid, attr.gid, attr.mode) == (uid, 6, stat.S_IFREG | 0o640)
    assert rig.read(b"d/" + name) == (data_of(name) if data is None else data)
    assert rig.call("getxattr", rig.node(b"d/" + name), b"user.k") == name


def test_who_changes_one_file_after_the_other_waits_for_the_disk_a_few_times(make: Maker, disk: Disk) -> None:
    rig = listed(make)
    before = {name: os.stat(make.base / "lower0/d" / os.fsdecode(name)).st_mtime_ns for name in NAMES}
    for name in NAMES:
        rig.change(b"d/" + name, uid=77)
    assert len(disk.waits) < COUNT // 6
    assert sum(disk.waits) == COUNT
    assert drafts(rig) == set()
    assert rig.fs.work is not None and os.listdir(make.layers.work / "work") == []
    for _ in make.now_and_again(rig):
        for name in NAMES:
            is_right(rig, name)
            assert rig.attr(b"d/" + name).mtime_ns == before[name]


def test_who_picks_files_has_no_others_copied(make: Maker, disk: Disk) -> None:
    rig = listed(make)
    for name in (*NAMES[::-1][:10], *NAMES[:30:3]):
        rig.change(b"d/" + name, uid=77)
        assert drafts(rig) == set()
    assert disk.waits == [1] * 20


def test_nothing_is_copied_in_advance_where_nothing_is_synced(make: Maker, disk: Disk) -> None:
    rig = listed(make, volatile=True)
    disk.has_to = False
    for name in NAMES:
        rig.change(b"d/" + name, uid=77)
        assert drafts(rig) == set()
    assert disk.waits == []


def test_a_file_changed_behind_our_back_is_copied_as_it_is_now(make: Maker) -> None:
    rig = listed(make)
    begin(rig)
    path = make.base / "lower0/d" / os.fsdecode(NAMES[4])
    path.write_bytes(b"something else")
    rig.change(b"d/" + NAMES[4], uid=77)
    is_right(rig, NAMES[4], data=b"something else")


def test_a_draft_that_could_not_be_synced_is_made_again(make: Maker, disk: Disk) -> None:
    rig = listed(make)
    disk.errors = dict.fromkeys(range(1, 100), errno.EIO)
    for name in NAMES[:10]:
        rig.change(b"d/" + name, uid=77)
        assert drafts(rig) == set()
    for name in NAMES[:10]:
        is_right(rig, name)


def test_a_copy_that_could_not_be_synced_is_none_and_the_next_attempt_makes_it(make: Maker, disk: Disk) -> None:
    rig = listed(make)
    for name in NAMES[:3]:
        rig.change(b"d/" + name, uid=77)
    disk.errors = {0: errno.ENOSPC}
    with pytest.raises(OSError, match="No space left"):
        rig.change(b"d/" + NAMES[3], uid=77)
    assert drafts(rig) == set()
    is_right(rig, NAMES[3], uid=5)
    disk.errors = {}
    rig.change(b"d/" + NAMES[3], uid=77)
    is_right(rig, NAMES[3])


def test_a_copy_is_made_where_there_is_no_room_for_more(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = listed(make)
    for name in NAMES[:3]:
        rig.change(b"d/" + name, uid=77)
    stage, room = Work.stage_file, [1]

    def stage_file(work: Work, mode: int) -> Any:
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room.pop()
        return stage(work, mode)

    monkeypatch.setattr(Work, "stage_file", stage_file)
    rig.change(b"d/" + NAMES[3], uid=77)
    is_right(rig, NAMES[3])
    assert drafts(rig) == set()


@pytest.mark.parametrize(
    ("change", "path", "data"),
    [
        (lambda rig, path: rig.write(path, b"W"), b"d/f04", b"W" + data_of(b"f04")[1:]),
        (lambda rig, path: rig.change(path, size=3), b"d/f04", data_of(b"f04")[:3]),
        (lambda rig, path: rig.rename(path, b"made"), b"made", data_of(b"f04")),
        (lambda rig, path: rig.link(path, b"made"), b"made", data_of(b"f04")),
        (lambda rig, path: rig.unlink(path), b"d/f04", None),
        (lambda rig, path: (rig.unlink(path), rig.create(path, b"new")), b"d/f04", b"new"),
    ],
    ids=["write", "truncate", "rename", "link", "unlink", "make anew"],
)
def test_a_file_with_a_draft_is_changed_as_any_other(
    make: Maker, change: Callable[[Rig, bytes], object], path: bytes, data: bytes | None
) -> None:
    rig = listed(make)
    begin(rig)
    change(rig, b"d/f04")
    rig.change(b"d/f05", uid=77)
    for _ in make.now_and_again(rig):
        is_right(rig, b"f05")
        if data is None:
            assert not rig.exists(path)
        else:
            assert rig.read(path) == data
        for name in NAMES[6:]:
            is_right(rig, name, uid=5)


def started(rig: Rig) -> Started:
    """An operation whose job is about to copy other files along."""
    for name in NAMES[:3]:
        rig.change(b"d/" + name, uid=77)
    return start_write(rig, b"d/" + NAMES[3])


def test_files_changed_while_they_are_copied_in_advance_stay_changed(make: Maker, disk: Disk) -> None:
    rig = listed(make)
    writing = started(rig)
    rig.write(b"d/f04", b"W")
    rig.unlink(b"d/f05")
    rig.call("write", writing.finish(), 0, b"W")
    assert drafts(rig) == {b"f06", b"f07"}
    for _ in make.now_and_again(rig):
        assert rig.read(b"d/f03") == b"W" + data_of(b"f03")[1:]
        assert rig.read(b"d/f04") == b"W" + data_of(b"f04")[1:]
        assert not rig.exists(b"d/f05")
        is_right(rig, b"f06", uid=5)


def test_another_file_copied_up_meanwhile_waits_for_nothing(make: Maker, disk: Disk) -> None:
    rig = listed(make)
    writing = started(rig)
    rig.change(b"d/f20", uid=77)
    assert disk.waits[-1] == 1
    writing.finish()
    assert disk.waits[-1] == 5
    is_right(rig, b"f20")


@pytest.mark.parametrize("executed", [False, True])
def test_an_operation_that_is_given_up_leaves_nothing(
    make: Maker, descriptors: Callable[[], int], executed: bool
) -> None:
    rig = listed(make)
    for name in NAMES[:3]:
        rig.change(b"d/" + name, uid=77)
    before = descriptors()
    writing = start_write(rig, b"d/" + NAMES[3])
    if executed and writing.job is not None:
        writing.job.execute()
    writing.steps.close()
    assert len(drafts(rig)) == 4 * executed
    assert descriptors() - before == 4 * executed
    assert os.listdir(make.layers.work / "work") == []
    rig.change(b"d/" + NAMES[3], uid=77)
    is_right(rig, NAMES[3])


def test_drafts_that_nobody_takes_are_few_and_go_with_the_overlay(make: Maker, descriptors: Callable[[], int]) -> None:
    wide = tuple(Node(b"%d/%s" % (number, name), data=b"data") for number in range(8) for name in NAMES)
    rig = make(wide)
    for number in range(8):
        for name in NAMES:
            rig.node(b"%d/%s" % (number, name))
    before = descriptors()
    for number in range(8):
        for name in NAMES[:8]:
            rig.change(b"%d/%s" % (number, name), uid=77)
        assert descriptors() - before <= 48 + 16
    held = len(rig.fs.drafts.ready)
    assert 0 < held <= 48
    now = descriptors()
    rig.fs.drafts.close()
    assert now - descriptors() == held


def test_an_overlay_without_unnamed_files_copies_none_in_advance(make: Maker, disk: Disk) -> None:
    rig = listed(make)
    assert rig.fs.work is not None
    rig.fs.work.tmpfiles = False
    for name in NAMES[:10]:
        rig.change(b"d/" + name, uid=77)
    assert isinstance(rig.fs.drafts, Drafts) and drafts(rig) == set()
    assert disk.waits == [1] * 10


def test_empty_large_and_changed_files_between_small_ones_are_passed_by(make: Maker, disk: Disk) -> None:
    kinds: dict[bytes, dict[str, Any]] = {b"a": {"data": b"small"}, b"e": {}, b"l": {"data": b"large" * 20_000}}
    kinds |= {b"s": {"data": b"head", "size": 60_000}, b"u": {"data": b"changed before"}, b"z": {"data": b"small too"}}
    names = [b"%02d%s" % (number, kind) for number in range(16) for kind in kinds]
    rig = make(tuple(Node(b"d/" + name, **kinds[name[2:]]) for name in names))
    for name in names:
        rig.node(b"d/" + name)
    for name in names:
        if name.endswith(b"u"):
            rig.write(b"d/" + name, b"C")
    disk.waits.clear()
    for name in names:
        rig.change(b"d/" + name, uid=77)
    # One for each of the large and of the sparse ones, few for all of the small.
    assert len(disk.waits) < 32 + 16
    for name in names:
        kind = kinds[name[2:]]
        data = bytes(kind.get("data", b"")).replace(b"changed before", b"Changed before")
        assert rig.read(b"d/" + name) == data.ljust(int(kind.get("size", 0)), b"\0")
        assert rig.attr(b"d/" + name).uid == 77


def test_picking_files_after_a_long_run_soon_copies_none_along(make: Maker, disk: Disk) -> None:
    rig = listed(make)
    for name in NAMES[:20]:
        rig.change(b"d/" + name, uid=77)
    for name in NAMES[:40:-3]:
        rig.change(b"d/" + name, uid=77)
    assert disk.waits[-3:] == [1] * 3


def test_the_draft_of_a_file_that_goes_is_given_up(make: Maker) -> None:
    rig = listed(make)
    begin(rig)
    closed: list[int] = []
    rig.fs.close_later = closed.append
    removed, forgotten = (rig.fs.drafts.ready[rig.node(b"d/" + name)].staged.fd for name in (b"f04", b"f05"))
    rig.unlink(b"d/f04")
    assert closed == [removed]
    rig.forget(rig.node(b"d/f05"))
    assert closed == [removed, forgotten]
    for fd in closed:
        os.close(fd)


def test_the_last_room_is_left_to_others(make: Maker, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstatvfs

    def nearly_full(fd: int) -> os.statvfs_result:
        found = list(real(fd))
        found[4] = (60 << 20) // found[1]
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "fstatvfs", nearly_full)
    rig = listed(make)
    for name in NAMES[:20]:
        rig.change(b"d/" + name, uid=77)
    assert drafts(rig) == set()
    assert disk.waits == [1] * 20
