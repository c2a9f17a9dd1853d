"""Operations that wait for data to be copied, while others go on: whatever the order, no data is lost."""

import errno
import os
from collections.abc import Generator
from typing import Any, ClassVar

import pytest

from overlayfs_py.core.ops import OPERATIONS
from overlayfs_py.core.requests import Changes, Job
from overlayfs_py.sys import copying
from tests.core.conftest import Maker
from tests.core.rig import Rig
from tests.support.trees import Node

DATA = b"0123456789abcdef" * 8192
LOWER = (
    Node(b"d/big", data=DATA, mode=0o640),
    Node(b"other", data=b"other"),
    Node(b"one", data=DATA),
    Node(b"two", kind="link", data=b"one"),
)


class Started:
    """An operation that has been started and waits for its job, as an engine has it.

    Whoever handed out a job first goes on first when it has run.
    """

    owners: ClassVar[dict[Job, "Started"]] = {}

    def __init__(self, rig: Rig, row: str, *arguments: Any) -> None:
        self.steps: Generator[Job, None, Any] = OPERATIONS[row](rig.fs, *arguments)
        self.result: Any = None
        self.job: Job | None = None
        self.advance()
        assert self.job is not None

    def advance(self) -> None:
        try:
            self.job = next(self.steps)
            self.owners.setdefault(self.job, self)
        except StopIteration as stop:
            self.job, self.result = None, stop.value

    def finish(self) -> Any:
        """Let jobs run and the operation go on to its end; an error is raised here."""
        while (job := self.job) is not None:
            if not job.finished:
                job.execute()
            owner = self.owners.get(job, self)
            if owner is not self and owner.job is job:
                owner.advance()
            else:
                self.advance()
        return self.result


def start_write(rig: Rig, path: bytes, flags: int = os.O_RDWR) -> Started:
    return Started(rig, "open", rig.node(path), flags)


def clean(make: Maker, rig: Rig) -> None:
    assert os.listdir(make.layers.work / "work") == []
    assert not rig.fs.copying


def test_two_copy_ups_of_one_file_share_the_work(make: Maker) -> None:
    rig = make(LOWER)
    first, second = start_write(rig, b"d/big"), start_write(rig, b"d/big")
    assert first.job is second.job
    one, other = first.finish(), second.finish()
    rig.call("write", one, 0, b"ONE")
    rig.call("write", other, 3, b"TWO")
    for _ in make.now_and_again(rig):
        assert rig.read(b"d/big") == b"ONETWO" + DATA[6:]
    clean(make, rig)


def test_an_operation_that_comes_between_the_copying_and_its_commit_waits_for_that(make: Maker) -> None:
    rig = make(LOWER)
    first = start_write(rig, b"d/big")
    assert first.job is not None
    first.job.execute()
    second = start_write(rig, b"d/big")
    assert second.job is first.job
    for operation in (first, second):
        rig.call("write", operation.finish(), 0, b"W")
    assert rig.read(b"d/big") == b"W" + DATA[1:]
    clean(make, rig)


def test_a_file_removed_during_its_copy_up_is_written_without_a_name(make: Maker) -> None:
    rig = make(LOWER)
    writing = start_write(rig, b"d/big")
    rig.unlink(b"d/big")
    file = writing.finish()
    rig.call("write", file, 0, b"W")
    assert rig.read_file(file) == b"W" + DATA[1:]
    assert not rig.exists(b"d/big")
    rig.call("release", file)
    assert make.again(rig).names(b"d") == set()
    clean(make, rig)


def test_a_name_made_anew_during_the_copy_up_is_not_overwritten(make: Maker) -> None:
    rig = make(LOWER)
    writing = start_write(rig, b"d/big")
    rig.unlink(b"d/big")
    rig.create(b"d/big", b"new")
    rig.call("write", writing.finish(), 0, b"W")
    for _ in make.now_and_again(rig):
        assert rig.read(b"d/big") == b"new"
    clean(make, rig)


def test_a_parent_renamed_during_the_copy_up_holds_the_copy(make: Maker) -> None:
    rig = make(LOWER)
    writing = start_write(rig, b"d/big")
    rig.rename(b"d", b"moved")
    rig.call("write", writing.finish(), 0, b"W")
    for _ in make.now_and_again(rig):
        assert rig.read(b"moved/big") == b"W" + DATA[1:]
        assert not rig.exists(b"d")
    clean(make, rig)


def test_a_file_renamed_during_its_copy_up_is_one_file(make: Maker) -> None:
    rig = make(LOWER)
    writing = start_write(rig, b"d/big")
    renaming = Started(rig, "rename", *rig.place(b"d/big"), *rig.place(b"moved"), 0)
    renaming.finish()
    rig.call("write", writing.finish(), 0, b"W")
    for _ in make.now_and_again(rig):
        assert rig.read(b"moved") == b"W" + DATA[1:]
        assert rig.names(b"d") == set()
    clean(make, rig)


def test_a_rename_that_waits_while_its_source_is_removed_fails(make: Maker) -> None:
    rig = make(LOWER)
    renaming = Started(rig, "rename", *rig.place(b"d/big"), *rig.place(b"moved"), 0)
    rig.unlink(b"d/big")
    with pytest.raises(FileNotFoundError):
        renaming.finish()
    for _ in make.now_and_again(rig):
        assert rig.names() == {b"d", b"other", b"one", b"two"}
        assert rig.names(b"d") == set()
    clean(make, rig)


def test_a_link_that_waits_while_its_source_is_removed_fails(make: Maker) -> None:
    rig = make(LOWER)
    linking = Started(rig, "link", rig.node(b"d/big"), rig.fs.root, b"linked")
    rig.unlink(b"d/big")
    with pytest.raises(FileNotFoundError):
        linking.finish()
    assert make.again(rig).names() == {b"d", b"other", b"one", b"two"}
    clean(make, rig)


def test_the_new_name_of_a_rename_that_waits_is_looked_at_again(make: Maker) -> None:
    rig = make(LOWER)
    renaming = Started(rig, "rename", *rig.place(b"d/big"), *rig.place(b"moved"), 1)
    rig.create(b"moved", b"came first")
    with pytest.raises(FileExistsError):
        renaming.finish()
    for _ in make.now_and_again(rig):
        assert rig.read(b"moved") == b"came first"
        assert rig.read(b"d/big") == DATA
    clean(make, rig)


def test_a_directory_removed_while_a_rename_into_it_waits_is_not_written_to(make: Maker) -> None:
    rig = make((*LOWER, Node(b"empty", kind="dir")))
    renaming = Started(rig, "rename", *rig.place(b"d/big"), *rig.place(b"empty/moved"), 0)
    rig.rmdir(b"empty")
    with pytest.raises(FileNotFoundError):
        renaming.finish()
    for _ in make.now_and_again(rig):
        assert rig.read(b"d/big") == DATA
        assert not rig.exists(b"empty")
    clean(make, rig)


def test_an_unlink_that_waits_while_another_takes_the_name_removes_nothing_else(make: Maker) -> None:
    rig = make((*LOWER, Node(b"e", kind="dir")))
    renaming = Started(rig, "rename", *rig.place(b"one"), *rig.place(b"e/one"), 0)
    removing = Started(rig, "unlink", rig.fs.root, b"one")
    renaming.finish()
    with pytest.raises(FileNotFoundError):
        removing.finish()
    for _ in make.now_and_again(rig):
        assert rig.read(b"e/one") == rig.read(b"two") == DATA
        assert rig.attr(b"two").nlink == 2
    clean(make, rig)


def test_attributes_changed_during_the_copy_up_are_kept(make: Maker) -> None:
    rig = make(LOWER)
    writing = start_write(rig, b"d/big")
    changing = Started(rig, "setattr", rig.node(b"d/big"), Changes(mode=0o600, mtime_ns=5))
    assert changing.job is writing.job
    changing.finish()
    writing.finish()
    attr = rig.attr(b"d/big")
    assert (attr.mode & 0o777, attr.mtime_ns) == (0o600, 5)
    clean(make, rig)


def test_attributes_of_a_metacopy_changed_while_it_gets_its_data_are_kept(make: Maker) -> None:
    rig = make(LOWER, metacopy=True)
    rig.change(b"d/big", mode=0o604)
    writing = start_write(rig, b"d/big")
    changing = Started(rig, "setattr", rig.node(b"d/big"), Changes(mode=0o600, mtime_ns=5))
    for operation in (writing, changing):
        operation.finish()
    attr = rig.attr(b"d/big")
    assert (attr.mode & 0o777, attr.mtime_ns) == (0o600, 5)
    assert rig.read(b"d/big") == DATA
    clean(make, rig)


def test_truncation_that_waits_for_a_copy_up_truncates_the_copy(make: Maker) -> None:
    rig = make(LOWER)
    writing = start_write(rig, b"d/big")
    truncating = Started(rig, "setattr", rig.node(b"d/big"), Changes(size=4))
    truncating.finish()
    writing.finish()
    for _ in make.now_and_again(rig):
        assert rig.read(b"d/big") == DATA[:4]
    clean(make, rig)


def test_reading_goes_on_during_a_copy_up(make: Maker) -> None:
    rig = make(LOWER)
    with rig.opened(b"d/big") as reader:
        writing = start_write(rig, b"d/big")
        assert rig.read_file(reader) == DATA
        rig.call("write", writing.finish(), 0, b"W")
        assert rig.read_file(reader) == b"W" + DATA[1:]


def test_both_names_of_a_linked_object_wait_for_one_copy(make: Maker) -> None:
    rig = make(LOWER)
    first, second = start_write(rig, b"one"), start_write(rig, b"two")
    assert first.job is second.job
    rig.call("write", second.finish(), 0, b"2")
    rig.call("write", first.finish(), 1, b"1")
    for _ in make.now_and_again(rig):
        assert rig.read(b"one") == rig.read(b"two") == b"21" + DATA[2:]
        assert rig.node(b"one") is rig.node(b"two")
    clean(make, rig)


def test_all_that_wait_for_a_copy_that_fails_are_told(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make(LOWER)

    def no_space(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(copying, "copy_data", no_space)
        waiting = [start_write(rig, b"d/big"), start_write(rig, b"d/big")]
        for operation in waiting:
            with pytest.raises(OSError, match="No space"):
                operation.finish()
    clean(make, rig)
    assert os.listdir(make.upper / "d") == []
    rig.call("write", start_write(rig, b"d/big").finish(), 0, b"W")
    assert rig.read(b"d/big") == b"W" + DATA[1:]


@pytest.mark.parametrize("metacopy", [False, True])
def test_a_copy_up_whose_caller_was_killed_ends_and_those_who_wait_begin_it_anew(make: Maker, metacopy: bool) -> None:
    rig = make(LOWER, metacopy=metacopy)
    if metacopy:
        rig.change(b"d/big", mode=0o600)
    first, second = start_write(rig, b"d/big"), start_write(rig, b"d/big")
    assert first.job is not None
    first.job.unwanted = lambda: True
    with pytest.raises(InterruptedError):
        first.finish()
    clean(make, rig)
    rig.call("write", second.finish(), 0, b"W")
    for _ in make.now_and_again(rig):
        assert rig.read(b"d/big") == b"W" + DATA[1:]
    clean(make, rig)


def test_a_copy_of_a_range_whose_caller_was_killed_ends(make: Maker) -> None:
    rig = make(LOWER)
    rig.create(b"target")
    copying_range = Started(rig, "copy_file_range", rig.node(b"d/big"), 0, rig.node(b"target"), 0, len(DATA))
    assert copying_range.job is not None
    copying_range.job.unwanted = lambda: True
    with pytest.raises(InterruptedError):
        copying_range.finish()
    assert rig.read(b"target") == b""


def test_a_copy_that_there_is_no_memory_for_fails_alone(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make(LOWER)

    def no_memory(*arguments: object, **options: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(copying, "copy_data", no_memory)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            start_write(rig, b"d/big").finish()
    clean(make, rig)
    rig.call("write", start_write(rig, b"d/big").finish(), 0, b"W")


@pytest.mark.parametrize("metacopy", [False, True])
def test_an_operation_given_up_leaves_nothing(make: Maker, metacopy: bool) -> None:
    rig = make(LOWER, metacopy=metacopy)
    if metacopy:
        rig.change(b"d/big", mode=0o600)
    rig.create(b"d/new")
    before = len(os.listdir("/proc/self/fd"))
    start_write(rig, b"d/big").steps.close()
    assert len(os.listdir("/proc/self/fd")) == before
    clean(make, rig)
    rig.write(b"d/big", b"W")
    assert rig.read(b"d/big") == b"W" + DATA[1:]
