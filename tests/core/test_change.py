"""Making, removing and renaming: what shows, now and after a remount, and what the upper layer then holds."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overlayfs_py.core.requests import Caller
from overlayfs_py.sys import files
from overlayfs_py.sys.rename import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from tests.core.conftest import Maker
from tests.core.rig import ALICE, Rig, differences
from tests.support.trees import Node, acl

LOWER = (
    Node(b"file", data=b"file", mode=0o604, uid=5),
    Node(b"other", data=b"other"),
    Node(b"d/x", data=b"x"),
    Node(b"d/sub/y", data=b"y"),
    Node(b"e/z", data=b"z"),
    Node(b"empty", kind="dir"),
    Node(b"sym", kind="symlink", data=b"file"),
)
KERNEL_OPAQUE = "trusted.overlay.opaque"


def fails_with(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as raised:
        call()
    assert raised.value.errno == number, raised.value


def is_whiteout(path: Path) -> bool:
    st = os.lstat(path)
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == 0


def same_after_remount(make: Maker, rig: Rig) -> Rig:
    before = rig.tree()
    rig = make.again(rig)
    after = rig.tree()
    assert not differences(before, after), "\n".join(differences(before, after))
    return rig


# Making.


@pytest.mark.parametrize("caller", [Caller(0, 0, os.getpid(), 0o027), ALICE._replace(umask=0o027)])
def test_new_objects_belong_to_their_maker_and_obey_the_umask(make: Maker, caller: Caller) -> None:
    rig = make(LOWER)
    rig.create(b"new", mode=0o666, caller=caller)
    rig.mkdir(b"newdir", 0o777, caller=caller)
    rig.mknod(b"fifo", stat.S_IFIFO | 0o666, caller=caller)
    rig.symlink(b"target", b"link", caller=caller)
    modes = {b"new": 0o640, b"newdir": 0o750, b"fifo": 0o640, b"link": 0o777}
    for _ in make.now_and_again(rig):
        for path, mode in modes.items():
            attr = rig.attr(path)
            assert (attr.uid, attr.gid, attr.mode & 0o7777) == (caller.uid, caller.gid, mode), path


@pytest.mark.parametrize("caller", [Caller(0, 0, os.getpid(), 0o022), ALICE])
def test_the_group_of_a_setgid_directory_is_inherited(make: Maker, caller: Caller) -> None:
    rig = make((Node(b"d", kind="dir", mode=0o2777, gid=77),))
    rig.create(b"d/new", caller=caller)
    rig.mkdir(b"d/newdir", caller=caller)
    assert rig.attr(b"d/new").gid == rig.attr(b"d/newdir").gid == 77
    assert rig.attr(b"d/newdir").mode & stat.S_ISGID


@pytest.mark.parametrize("caller", [Caller(0, 0, os.getpid(), 0o077), ALICE._replace(umask=0o077)])
def test_a_default_acl_is_inherited_in_the_place_of_the_umask(make: Maker, caller: Caller) -> None:
    none = 0xFFFFFFFF
    default = acl((1, 7, none), (2, 6, 44), (4, 5, none), (0x10, 7, none), (0x20, 4, none))
    rig = make((Node(b"d", kind="dir", xattrs=(("system.posix_acl_default", default),)),))
    rig.create(b"d/new", mode=0o666, caller=caller)
    rig.mkdir(b"d/newdir", 0o777, caller=caller)
    assert rig.attr(b"d/new").mode & 0o777 == 0o664
    assert rig.attr(b"d/newdir").mode & 0o777 == 0o774
    assert rig.xattrs(b"d/newdir")[b"system.posix_acl_default"] == default
    assert b"system.posix_acl_access" in rig.xattrs(b"d/new")


@pytest.mark.parametrize("path", [b"file", b"d", b"sym", b"d/x"])
def test_nothing_is_made_over_what_is_there(make: Maker, path: bytes) -> None:
    rig = make(LOWER)
    before = rig.tree()
    fails_with(errno.EEXIST, lambda: rig.mkdir(path))
    fails_with(errno.EEXIST, lambda: rig.create(path))
    fails_with(errno.EEXIST, lambda: rig.symlink(b"target", path))
    fails_with(errno.EEXIST, lambda: rig.mknod(path, stat.S_IFIFO))
    fails_with(errno.EEXIST, lambda: rig.link(b"other", path))
    assert not differences(before, rig.tree(), timeless={stat.S_IFDIR})


def test_what_replaces_a_whiteout_shows_nothing_of_what_was_removed(make: Maker) -> None:
    rig = make(LOWER)
    for path in (b"file", b"d/sub/y"):
        rig.unlink(path)
    rig.rmdir(b"d/sub")
    rig.mkdir(b"file")
    rig.create(b"d/sub", b"now a file")
    assert rig.names(b"file") == set()
    rig.unlink(b"d/x")
    rig.unlink(b"d/sub")
    rig.rmdir(b"d")
    rig.mkdir(b"d")
    assert rig.names(b"d") == set()
    assert os.getxattr(make.upper / "d", KERNEL_OPAQUE) == b"y"
    rig = same_after_remount(make, rig)
    assert rig.names(b"d") == set()


def test_a_directory_where_nothing_shows_through_is_not_opaque(make: Maker) -> None:
    rig = make(LOWER)
    rig.mkdir(b"new")
    rig.mkdir(b"new/below")
    assert KERNEL_OPAQUE not in os.listxattr(make.upper / "new/below")


def test_a_whiteout_device_cannot_be_made(make: Maker) -> None:
    fails_with(errno.EPERM, lambda: make(LOWER).mknod(b"w", stat.S_IFCHR, 0))


def test_a_file_whose_name_looks_like_a_mark_is_a_file(make: Maker) -> None:
    rig = make(LOWER)
    names = {b".wh.file", b".wh.", b".wh..wh..opq", b".wh." + b"n" * 251}
    for name in names:
        rig.create(name, b"data of " + name[:9])
    rig.create(b"plain", b"plain")
    rig.link(b"plain", b".wh.linked")
    rig.rename(b"plain", b".wh.renamed")
    names |= {b".wh.linked", b".wh.renamed"}
    for _ in make.now_and_again(rig):
        assert names < rig.names()
        assert rig.read(b"file") == b"file"
        assert rig.read(b".wh.file") == b"data of .wh.file"
        assert rig.exists(b"d")


def test_an_existing_mark_is_not_overwritten(make: Maker) -> None:
    rig = make(LOWER, upper=(Node(b".wh.file"),))
    assert not rig.exists(b"file")
    fails_with(errno.EEXIST, lambda: rig.create(b".wh.file"))
    assert not rig.exists(b"file")


def test_a_name_too_long_is_refused(make: Maker) -> None:
    rig = make(LOWER)
    fails_with(errno.ENAMETOOLONG, lambda: rig.create(b"n" * 256))
    fails_with(errno.ENAMETOOLONG, lambda: rig.mkdir(b"n" * 256))
    fails_with(errno.ENAMETOOLONG, lambda: rig.rename(b"file", b"n" * 256))
    fails_with(errno.ENAMETOOLONG, lambda: rig.link(b"file", b"n" * 256))


# Removing.


def test_a_removed_lower_object_leaves_a_whiteout(make: Maker) -> None:
    rig = make(LOWER)
    rig.unlink(b"d/x")
    rig.rmdir(b"empty")
    assert is_whiteout(make.upper / "d/x")
    assert is_whiteout(make.upper / "empty")
    assert same_after_remount(make, rig).names(b"d") == {b"sub"}


def test_whiteouts_are_names_of_one_device_for_as_long_as_it_has_any(make: Maker) -> None:
    rig = make(tuple(Node(b"d/%d" % number, data=b"lower") for number in range(4)))
    for name in (b"d/0", b"d/1"):
        rig.unlink(name)
    assert (make.upper / "d/0").samefile(make.upper / "d/1")
    # What takes a whiteout's place takes its name away.
    for name in (b"d/0", b"d/1"):
        rig.create(name)
    for name in (b"d/2", b"d/3"):
        rig.unlink(name)
    assert is_whiteout(make.upper / "d/2")
    assert (make.upper / "d/2").samefile(make.upper / "d/3")


@pytest.mark.parametrize("number", [errno.EMLINK, errno.EXDEV, errno.EPERM])
def test_a_whiteout_that_can_have_no_more_names_is_followed_by_another(
    make: Maker, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    rig = make((Node(b"d/0", data=b"lower"), Node(b"d/1", data=b"lower")))
    rig.unlink(b"d/0")

    def refuse(fd: int, dir_fd: int, name: bytes) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "link_fd", refuse)
    rig.unlink(b"d/1")
    assert is_whiteout(make.upper / "d/1")
    assert not (make.upper / "d/0").samefile(make.upper / "d/1")


def test_a_removed_upper_object_leaves_nothing(make: Maker) -> None:
    rig = make(LOWER)
    rig.create(b"d/new")
    rig.unlink(b"d/new")
    rig.mkdir(b"d/newdir")
    rig.rmdir(b"d/newdir")
    assert os.listdir(make.upper / "d") == []


def test_an_object_hidden_by_an_opaque_directory_leaves_no_whiteout(make: Maker) -> None:
    rig = make(LOWER, upper=(Node(b"d", kind="dir", xattrs=(("@opaque", b"y"),)), Node(b"d/x", data=b"upper")))
    rig.unlink(b"d/x")
    assert os.listdir(make.upper / "d") == []


def test_a_directory_is_removed_when_empty_and_not_before(make: Maker) -> None:
    rig = make(LOWER)
    fails_with(errno.ENOTEMPTY, lambda: rig.rmdir(b"d"))
    fails_with(errno.ENOTDIR, lambda: rig.rmdir(b"file"))
    fails_with(errno.EISDIR, lambda: rig.unlink(b"d"))
    fails_with(errno.ENOENT, lambda: rig.unlink(b"nothing"))
    rig.unlink(b"d/x")
    rig.unlink(b"d/sub/y")
    rig.rmdir(b"d/sub")
    rig.rmdir(b"d")
    assert is_whiteout(make.upper / "d")
    assert os.listdir(make.layers.work / "work") == []
    same_after_remount(make, rig)


def test_nothing_is_made_in_a_removed_directory(make: Maker) -> None:
    rig = make(LOWER)
    gone = rig.node(b"empty")
    rig.rmdir(b"empty")
    fails_with(errno.ENOENT, lambda: rig.call("mkdir", ALICE, gone, b"new", 0o755))
    fails_with(errno.ENOENT, lambda: rig.call("lookup", gone, b"new"))
    fails_with(errno.ENOENT, lambda: rig.call("rename", rig.fs.root, b"file", gone, b"file", 0))
    assert rig.call("getattr", gone).nlink == 0


STYLES: dict[str, dict[str, object]] = {
    "device": {},
    "two steps": {"rename_whiteout": False},
    "xattr": {"whiteouts": "xattr"},
}


@pytest.fixture(params=STYLES)
def styled(make: Maker, request: pytest.FixtureRequest) -> tuple[Maker, Rig]:
    """An overlay that makes whiteouts in one of the ways there are."""
    rig = make(LOWER)
    assert rig.fs.work is not None
    for name, value in STYLES[request.param].items():
        setattr(rig.fs.work, name, value)
    return make, rig


def test_all_kinds_of_whiteouts_hide(styled: tuple[Maker, Rig]) -> None:
    make, rig = styled
    rig.unlink(b"file")
    rig.rename(b"other", b"d/other")
    rig.rename(b"d/x", b"e/z")
    rig.rename(b"d/sub", b"moved")
    rig.rmdir(b"empty")
    rig.rename(b"e", b"file")
    assert rig.names() == {b"d", b"file", b"moved", b"sym"}
    assert (rig.names(b"d"), rig.names(b"file"), rig.names(b"moved")) == ({b"other"}, {b"z"}, {b"y"})
    assert rig.read(b"file/z") == b"x"
    rig.mkdir(b"e")
    rig.create(b"d/x", b"new")
    assert rig.names(b"e") == set()
    rig = same_after_remount(make, rig)
    assert rig.read(b"d/x") == b"new"


# Renaming.


def test_a_renamed_merged_directory_keeps_its_content_through_a_redirect(make: Maker) -> None:
    rig = make(LOWER)
    rig.create(b"d/new", b"new")
    rig.rename(b"d", b"moved")
    assert os.getxattr(make.upper / "moved", "trusted.overlay.redirect") == b"d"
    rig.rename(b"moved", b"e/deeper")
    assert os.getxattr(make.upper / "e/deeper", "trusted.overlay.redirect") == b"/d"
    rig.rename(b"e", b"top")
    rig.rename(b"top/deeper/sub", b"sub")
    assert os.getxattr(make.upper / "sub", "trusted.overlay.redirect") == b"/d/sub"
    assert rig.names(b"top/deeper") == {b"x", b"new"}
    assert rig.read(b"sub/y") == b"y"
    rig.write(b"sub/y", b"Y")
    rig = same_after_remount(make, rig)
    assert rig.read(b"sub/y") == b"Y"
    assert not rig.exists(b"d")


def test_renaming_there_and_back_changes_nothing(make: Maker) -> None:
    rig = make(LOWER)
    before = rig.tree()
    for old, new in ((b"d", b"moved"), (b"file", b"moved/file"), (b"moved/sub", b"sub")):
        rig.rename(old, new)
    for old, new in ((b"sub", b"moved/sub"), (b"moved/file", b"file"), (b"moved", b"d")):
        rig.rename(old, new)
    assert not differences(before, rig.tree(), timeless={stat.S_IFDIR})
    same_after_remount(make, rig)


@pytest.mark.parametrize("options", [{"redirect_dir": "follow"}, {"redirect_dir": "nofollow"}, {"userxattr": True}])
def test_a_merged_directory_is_not_renamed_without_redirects(make: Maker, options: dict[str, Any]) -> None:
    rig = make(LOWER, **options)
    before = rig.tree()
    fails_with(errno.EXDEV, lambda: rig.rename(b"d", b"moved"))
    fails_with(errno.EXDEV, lambda: rig.rename(b"file", b"d", RENAME_EXCHANGE))
    assert not differences(before, rig.tree())
    rig.mkdir(b"new")
    rig.rename(b"new", b"newer")
    rig.rename(b"file", b"newer/file")
    same_after_remount(make, rig)


def test_an_upper_directory_moved_over_a_whiteout_stays_opaque(make: Maker) -> None:
    rig = make(LOWER)
    rig.mkdir(b"new")
    rig.create(b"new/n")
    rig.unlink(b"e/z")
    rig.rmdir(b"e")
    rig.rename(b"new", b"e")
    rig = same_after_remount(make, rig)
    assert rig.names(b"e") == {b"n"}
    assert not (make.upper / "new").exists()


def test_an_upper_directory_moved_into_a_merged_one_shows_nothing_below(make: Maker) -> None:
    rig = make(LOWER)
    rig.rename(b"d/sub", b"gone")
    rig.mkdir(b"new")
    rig.rename(b"new", b"d/sub")
    assert same_after_remount(make, rig).names(b"d/sub") == set()


def test_renaming_replaces_what_may_be_replaced(make: Maker) -> None:
    rig = make(LOWER)
    rig.rename(b"file", b"other")
    assert rig.read(b"other") == b"file"
    fails_with(errno.EISDIR, lambda: rig.rename(b"other", b"d"))
    fails_with(errno.ENOTDIR, lambda: rig.rename(b"d", b"other"))
    fails_with(errno.ENOTEMPTY, lambda: rig.rename(b"e", b"d"))
    fails_with(errno.ENOENT, lambda: rig.rename(b"nothing", b"d"))
    rig.rename(b"e", b"empty")
    assert rig.names(b"empty") == {b"z"}
    rig.unlink(b"d/x")
    rig.rename(b"d/sub", b"d/other")
    rig.rename(b"d/other", b"sub")
    rig.rename(b"empty", b"d")
    assert rig.names(b"d") == {b"z"}
    rig = same_after_remount(make, rig)
    assert rig.names() == {b"d", b"other", b"sub", b"sym"}


def test_the_flags_of_a_rename_are_obeyed(make: Maker) -> None:
    rig = make(LOWER)
    fails_with(errno.EEXIST, lambda: rig.rename(b"file", b"other", RENAME_NOREPLACE))
    fails_with(errno.EINVAL, lambda: rig.rename(b"file", b"other", RENAME_NOREPLACE | RENAME_EXCHANGE))
    fails_with(errno.EINVAL, lambda: rig.rename(b"file", b"other", 8))
    fails_with(errno.ENOENT, lambda: rig.rename(b"file", b"nothing", RENAME_EXCHANGE))
    rig.rename(b"file", b"d", RENAME_EXCHANGE)
    assert rig.read(b"d") == b"file"
    assert rig.names(b"file") == {b"x", b"sub"}
    rig.rename(b"d", b"new", RENAME_WHITEOUT)
    assert not rig.exists(b"d")
    rig = same_after_remount(make, rig)
    assert is_whiteout(make.upper / "d")


def test_a_directory_exchanged_for_one_of_another_depth(make: Maker) -> None:
    rig = make(LOWER)
    rig.rename(b"d/sub", b"e", RENAME_EXCHANGE)
    rig = same_after_remount(make, rig)
    assert (rig.names(b"d/sub"), rig.names(b"e")) == ({b"z"}, {b"y"})


def test_a_directory_that_moves_where_a_dot_whiteout_is_keeps_its_lower_parts(make: Maker) -> None:
    rig = make(LOWER, upper=(Node(b".wh.e"),))
    assert not rig.exists(b"e")
    rig.rename(b"d", b"e")
    for _ in make.now_and_again(rig):
        assert rig.names(b"e") == {b"x", b"sub"}
        assert not rig.exists(b"d")


def test_directories_exchanged_beside_dot_whiteouts_keep_what_they_show(make: Maker) -> None:
    rig = make(LOWER, upper=(Node(b".wh.e"), Node(b"e/upper")))
    assert rig.names(b"e") == {b"upper"}
    rig.rename(b"d", b"e", RENAME_EXCHANGE)
    for _ in make.now_and_again(rig):
        assert (rig.names(b"e"), rig.names(b"d")) == ({b"x", b"sub"}, {b"upper"})


def test_a_renamed_metacopy_finds_its_data(make: Maker) -> None:
    rig = make(LOWER, metacopy=True)
    rig.rename(b"file", b"d/moved")
    rig.rename(b"d", b"e/d")
    rig.rename(b"e/d/moved", b"back")
    rig.link(b"back", b"e/linked")
    for _ in make.now_and_again(rig):
        assert rig.read(b"back") == rig.read(b"e/linked") == b"file"
        assert rig.node(b"back") is rig.node(b"e/linked")
    assert "trusted.overlay.metacopy" in os.listxattr(make.upper / "back")


def test_open_files_and_directories_follow_a_rename(make: Maker) -> None:
    rig = make(LOWER)
    with rig.opened(b"d/sub/y", os.O_RDWR) as file:
        rig.rename(b"d", b"moved")
        rig.call("write", file, 0, b"Y")
        rig.create(b"moved/sub/new", b"new")
        assert rig.read(b"moved/sub/y") == b"Y"
    same_after_remount(make, rig)
