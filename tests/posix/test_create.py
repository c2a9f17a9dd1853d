"""Making files: what mkdir, mkfifo, mknod, symlink, bind and open with O_CREAT give the new file and its directory."""

import errno
import os
import stat
import time

import pytest

from tests.posix import calls
from tests.posix.files import CREATIONS, FORMATS, NODES, TYPES, UNPRIVILEGED_CREATIONS, Call, kind_of, make
from tests.posix.rig import MEMBER, OTHER, OWNER, Root, User, as_user, fails, inside, opened, prepared, umask, write

NEW = tuple(one for one in CREATIONS if one.name not in ("link-to", "rename-to"))
UNPRIVILEGED_NEW = tuple(one for one in UNPRIVILEGED_CREATIONS if one in NEW)


def build_parent() -> None:
    os.mkdir("d")
    write("d/old", b"old")
    os.mkdir("d/sub")
    os.chmod("d", 0o777)
    write("source", b"source")


@pytest.mark.parametrize("call", CREATIONS, ids=str)
@prepared(build_parent)
def test_a_new_name_advances_the_times_of_its_directory(root: Root, call: Call) -> None:
    with root.touches(d="mc"):
        call.run("d/new")
    assert sorted(os.listdir("d")) == ["new", "old", "sub"]


@pytest.mark.parametrize("call", NEW, ids=str)
@prepared(build_parent)
def test_a_new_file_has_the_time_of_its_making(root: Root, call: Call) -> None:
    before = time.time_ns() - 20_000_000  # the clock of filesystems lags by up to a tick
    call.run("d/new")
    st = os.lstat("d/new")
    for stamp in (st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns):
        assert before <= stamp <= time.time_ns()


@pytest.mark.parametrize("call", UNPRIVILEGED_NEW, ids=str)
@prepared(build_parent)
def test_a_new_file_belongs_to_its_maker(root: Root, call: Call) -> None:
    for user in (OWNER, MEMBER):
        as_user(user, call.run, "d/new")
        st = os.lstat("d/new")
        assert (st.st_uid, st.st_gid) == (user.uid, user.gid)
        (os.rmdir if stat.S_ISDIR(st.st_mode) else os.unlink)("d/new")


def build_setgid() -> None:
    os.mkdir("d")
    os.chown("d", 0, OWNER.gid)
    os.chmod("d", 0o2777)


@pytest.mark.parametrize("user", [OWNER, MEMBER, OTHER], ids=["owner", "member", "other"])
@pytest.mark.parametrize("call", UNPRIVILEGED_NEW, ids=str)
@prepared(build_setgid)
def test_a_setgid_directory_gives_its_group_to_what_is_made_in_it(root: Root, call: Call, user: User) -> None:
    as_user(user, call.run, "d/new")
    st = os.lstat("d/new")
    assert (st.st_uid, st.st_gid) == (user.uid, OWNER.gid)
    assert bool(st.st_mode & stat.S_ISGID) == (call.name == "mkdir")


@prepared(build_setgid)
def test_the_setgid_bit_goes_on_from_directory_to_directory(root: Root) -> None:
    os.makedirs("d/a/b/c")
    for path in ("d/a", "d/a/b", "d/a/b/c"):
        assert os.stat(path).st_gid == OWNER.gid
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o2755


@pytest.mark.parametrize(
    ("user", "kept"), [(OWNER, True), (MEMBER, True), (OTHER, False)], ids=["owner", "member", "other"]
)
@prepared(build_setgid)
def test_only_members_make_setgid_programs_in_a_setgid_directory(root: Root, user: User, kept: bool) -> None:
    def create() -> None:
        with umask(0):
            os.close(os.open("d/opened", os.O_CREAT | os.O_WRONLY, 0o2775))
            os.mknod("d/made", stat.S_IFREG | 0o2775)

    as_user(user, create)
    for path in ("d/opened", "d/made"):
        assert bool(os.stat(path).st_mode & stat.S_ISGID) == kept


MASKS = (0o000, 0o022, 0o027, 0o077, 0o151, 0o777)
MODES = (0o777, 0o755, 0o644, 0o151, 0o000)


@pytest.mark.parametrize("mask", MASKS, ids=oct)
@prepared(build_parent)
def test_the_umask_takes_bits_from_every_new_file(root: Root, mask: int) -> None:
    with umask(mask):
        for mode in MODES:
            os.mkdir(f"d/dir{mode}", mode)
            os.mkfifo(f"d/fifo{mode}", mode)
            os.mknod(f"d/node{mode}", stat.S_IFCHR | mode, os.makedev(1, 3))
            os.mknod(f"d/regular{mode}", stat.S_IFREG | mode)
            os.close(os.open(f"d/file{mode}", os.O_CREAT | os.O_WRONLY, mode))
        os.symlink("x", "d/link")
    for mode in MODES:
        for name in ("dir", "fifo", "node", "regular", "file"):
            assert stat.S_IMODE(os.lstat(f"d/{name}{mode}").st_mode) == mode & ~mask, f"{name} {mode:o}"
    assert stat.S_IMODE(os.lstat("d/link").st_mode) == 0o777


@prepared(build_parent)
def test_special_bits_can_be_given_at_the_making(root: Root) -> None:
    with umask(0):
        os.mkdir("d/sticky", 0o1777)
        os.close(os.open("d/file", os.O_CREAT | os.O_WRONLY, 0o6755))
        os.mknod("d/node", stat.S_IFREG | 0o6755)
    assert stat.S_IMODE(os.stat("d/sticky").st_mode) == 0o1777
    assert stat.S_IMODE(os.stat("d/file").st_mode) == 0o6755
    assert stat.S_IMODE(os.stat("d/node").st_mode) == 0o6755


@prepared(build_parent)
def test_a_new_directory_is_empty_and_counted_in_its_parent(root: Root) -> None:
    root.check_dir_links("d", 3)
    os.mkdir("d/new")
    root.check_dir_links("d", 4)
    root.check_dir_links("d/new", 2)
    assert os.listdir("d/new") == []
    os.rmdir("d/new")
    root.check_dir_links("d", 3)


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_parent)
def test_a_new_file_has_its_type_one_link_and_an_inode_of_its_own(root: Root, kind: str) -> None:
    make(kind, "d/new")
    st = os.lstat("d/new")
    assert stat.S_IFMT(st.st_mode) == FORMATS[kind]
    assert st.st_ino not in (0, os.stat("d/old").st_ino, os.stat("d").st_ino)
    assert st.st_dev == os.stat("d").st_dev
    if kind != "directory":
        assert st.st_nlink == 1
    with os.scandir("d") as entries:
        assert next(entry.inode() for entry in entries if entry.name == "new") == st.st_ino


@pytest.mark.parametrize("kind", ["block", "char"])
@pytest.mark.parametrize("device", [(0, 1), (1, 3), (8, 0), (255, 255), (4095, 1048575), (256, 65536)], ids=str)
@prepared(build_parent)
def test_a_device_keeps_its_number(root: Root, kind: str, device: tuple[int, int]) -> None:
    os.mknod("d/new", FORMATS[kind] | 0o600, os.makedev(*device))
    st = os.lstat("d/new")
    assert (os.major(st.st_rdev), os.minor(st.st_rdev)) == device
    assert kind_of("d/new") == kind


@pytest.mark.parametrize("kind", NODES)
@prepared(build_parent)
def test_mknod_makes_every_kind_of_node(root: Root, kind: str) -> None:
    os.mknod("d/new", FORMATS[kind] | 0o640, os.makedev(1, 3))
    assert kind_of("d/new") == kind
    assert stat.S_IMODE(os.lstat("d/new").st_mode) == 0o640


@prepared(build_parent)
def test_mknod_without_a_type_makes_a_regular_file(root: Root) -> None:
    os.mknod("d/new", 0o640)
    assert kind_of("d/new") == "regular"


@prepared(build_parent)
def test_mknod_makes_no_directories_or_links(root: Root) -> None:
    with root.touches(d=""):
        with fails(errno.EPERM):
            os.mknod("d/new", stat.S_IFDIR | 0o755)
        with fails(errno.EINVAL):
            os.mknod("d/new", stat.S_IFLNK | 0o777)
    assert kind_of("d/new") == "missing"


@pytest.mark.parametrize("kind", ["block", "char"])
@prepared(build_parent)
def test_only_root_makes_devices(root: Root, kind: str) -> None:
    with root.touches(d=""), fails(errno.EPERM):
        as_user(OWNER, lambda: os.mknod("d/new", FORMATS[kind] | 0o600, os.makedev(1, 3)))
    assert kind_of("d/new") == "missing"


@prepared(build_parent)
def test_a_device_that_would_be_a_whiteout_is_refused_by_an_overlay(root: Root) -> None:
    if not root.traits.overlay:
        os.mknod("d/new", stat.S_IFCHR | 0o600, 0)
        assert kind_of("d/new") == "char"
        return
    with root.touches(d=""), fails(errno.EPERM):
        os.mknod("d/new", stat.S_IFCHR | 0o600, 0)
    assert sorted(os.listdir("d")) == ["old", "sub"]


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_parent)
def test_a_name_can_be_made_removed_and_made_again_with_every_type(root: Root, kind: str) -> None:
    for other in TYPES:
        make(kind, "d/old.new")
        assert kind_of("d/old.new") == kind
        (os.rmdir if kind == "directory" else os.unlink)("d/old.new")
        assert kind_of("d/old.new") == "missing"
        make(other, "d/old.new")
        assert kind_of("d/old.new") == other
        (os.rmdir if other == "directory" else os.unlink)("d/old.new")


@prepared(build_parent)
def test_a_file_is_made_in_a_directory_by_its_descriptor(root: Root) -> None:
    with opened("d", os.O_RDONLY | os.O_DIRECTORY) as directory:
        os.rename("d", "moved")
        os.mkdir("new", dir_fd=directory)
        os.symlink("x", "link", dir_fd=directory)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=directory))
        os.mkfifo("fifo", dir_fd=directory)
        assert sorted(os.listdir(directory)) == ["fifo", "file", "link", "new", "old", "sub"]
    assert sorted(os.listdir("moved")) == ["fifo", "file", "link", "new", "old", "sub"]


@pytest.mark.parametrize("call", CREATIONS, ids=str)
def test_nothing_is_made_in_a_directory_that_was_removed(root: Root, call: Call) -> None:
    os.mkdir("gone")
    write("outside", b"")
    with inside("gone") as before:
        os.rmdir("../gone")
        with fails(errno.ENOENT):
            if call.name == "link-to":
                os.link("outside", "new", src_dir_fd=before)
            else:
                call.run("new")
        assert os.listdir(".") == []
        with fails(errno.ENOENT):
            os.listdir("../gone")


def test_o_tmpfile_makes_a_file_without_a_name(root: Root) -> None:
    if not root.traits.tmpfile:
        with fails(errno.EOPNOTSUPP):
            os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600)
        return
    with opened(".", os.O_TMPFILE | os.O_RDWR, 0o600) as descriptor:
        assert os.listdir() == []
        assert os.fstat(descriptor).st_nlink == 0
        os.write(descriptor, b"data")
        calls.link_descriptor(descriptor, "named")
        assert os.fstat(descriptor).st_nlink == 1
    assert os.listdir() == ["named"]
    assert os.stat("named").st_size == 4


def test_o_tmpfile_with_o_excl_never_gets_a_name(root: Root) -> None:
    if not root.traits.tmpfile:
        with fails(errno.EOPNOTSUPP):
            os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
        return
    with opened(".", os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600) as descriptor:
        with fails(errno.ENOENT):
            calls.link_descriptor(descriptor, "named")
