"""How paths are resolved, for every call that takes one: what is missing, too long, a loop, or not to be passed."""

import errno
import os
import stat

import pytest

from tests.posix import calls
from tests.posix.files import CALLS, CREATIONS, LOOKUPS, NOT_DIRECTORIES, TYPES, UNPRIVILEGED_CREATIONS, Call, make
from tests.posix.rig import OTHER, OWNER, Root, as_user, fails, inside, opened, prepared, read, write

BEYOND_BIND = "bind"  # a socket's address holds 107 bytes, less than a name or path may have


def build_source() -> None:
    write("source", b"source")


def build_obstacles() -> None:
    build_source()
    for kind in NOT_DIRECTORIES:
        make(kind, kind)


@pytest.mark.parametrize("call", CALLS, ids=str)
@prepared(build_obstacles)
def test_a_component_that_is_no_directory_gives_enotdir(root: Root, call: Call) -> None:
    with root.touches(here="", regular="", fifo="", block="", char="", socket="", symlink=""):
        for kind in NOT_DIRECTORIES:
            with fails(errno.ENOENT if kind == "symlink" else errno.ENOTDIR):
                call.run(f"{kind}/name")


def build_directory() -> None:
    build_source()
    os.mkdir("d")


@pytest.mark.parametrize("call", CALLS, ids=str)
@prepared(build_directory)
def test_a_missing_component_gives_enoent(root: Root, call: Call) -> None:
    with root.touches(d=""), fails(errno.ENOENT):
        call.run("d/missing/name")


@pytest.mark.parametrize("call", LOOKUPS, ids=str)
@prepared(build_directory)
def test_a_missing_name_gives_enoent(root: Root, call: Call) -> None:
    with root.touches(d=""), fails(errno.ENOENT):
        call.run("d/missing")
    assert os.listdir("d") == []


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_an_empty_path_gives_enoent(root: Root, call: Call) -> None:
    build_source()
    if call.name == BEYOND_BIND:
        # An empty address makes a socket without a name in the filesystem, unix(7).
        call.run("")
        assert os.listdir() == ["source"]
        return
    with fails(errno.ENOENT):
        call.run("")


@pytest.mark.parametrize("call", CALLS, ids=str)
@prepared(build_directory)
def test_a_name_of_256_bytes_gives_enametoolong(root: Root, call: Call) -> None:
    if call.name == BEYOND_BIND:
        with pytest.raises(OSError, match="too long"):
            call.run("d/" + "n" * 256)
        return
    with root.touches(d=""), fails(errno.ENAMETOOLONG):
        call.run("d/" + "n" * 256)
    with fails(errno.ENAMETOOLONG):
        call.run("d/" + "n" * 256 + "/name")


@pytest.mark.parametrize("call", [one for one in CREATIONS if one.name != BEYOND_BIND], ids=str)
@prepared(build_directory)
def test_a_name_of_255_bytes_can_be_made_and_removed(root: Root, call: Call) -> None:
    name = "n" * 255
    call.run(f"d/{name}")
    assert os.listdir("d") == [name]
    (os.rmdir if call.name == "mkdir" else os.unlink)(f"d/{name}")
    assert os.listdir("d") == []


@pytest.mark.parametrize("call", [one for one in CALLS if one.name != BEYOND_BIND], ids=str)
@prepared(build_directory)
def test_a_path_of_path_max_bytes_gives_enametoolong(root: Root, call: Call) -> None:
    with root.touches(d=""), fails(errno.ENAMETOOLONG):
        call.run("d/" + "./" * 2047)
    with fails(errno.ENAMETOOLONG):
        call.run("d/" + "./" * 2045 + "1234")


def test_a_path_of_one_byte_less_than_path_max_works(root: Root) -> None:
    path = "./" * 2045 + "12345"
    assert len(path) == 4095
    write(path, b"data")
    os.chmod(path, 0o600)
    assert read("12345") == b"data"
    os.rename(path, "./" * 2045 + "54321")
    assert os.listdir() == ["54321"]


def build_loop() -> None:
    build_source()
    os.symlink("b", "a")
    os.symlink("a", "b")
    os.symlink("self", "self")


@pytest.mark.parametrize("call", CALLS, ids=str)
@prepared(build_loop)
def test_a_loop_of_links_in_a_path_gives_eloop(root: Root, call: Call) -> None:
    for loop in ("a", "b", "self"):
        with root.touches(here="", a=""), fails(errno.ELOOP):
            call.run(f"{loop}/name")


@pytest.mark.parametrize("call", [one for one in LOOKUPS if one.follows], ids=str)
@prepared(build_loop)
def test_a_loop_of_links_at_the_end_gives_eloop_to_calls_that_follow(root: Root, call: Call) -> None:
    with root.touches(here="", a="", b=""), fails(errno.ELOOP):
        call.run("a")


def build_chain() -> None:
    write("end", b"data")
    previous = "end"
    for number in range(1, 42):
        os.symlink(previous, f"link{number}")
        previous = f"link{number}"


@prepared(build_chain)
def test_forty_links_are_followed_and_no_more(root: Root) -> None:
    assert read("link40") == b"data"
    with fails(errno.ELOOP):
        os.stat("link41")


def build_locked() -> None:
    build_source()
    os.mkdir("locked")
    write("locked/f", b"data", 0o666)
    os.chmod("locked", 0o600)
    os.chown("locked", OWNER.uid, OWNER.gid)
    os.chmod(".", 0o777)
    os.chown("source", OWNER.uid, OWNER.gid)


@pytest.mark.parametrize("call", LOOKUPS, ids=str)
@prepared(build_locked)
def test_a_directory_without_search_permission_hides_what_is_in_it(root: Root, call: Call) -> None:
    for user in (OWNER, OTHER):
        with root.touches(locked=""), fails(errno.EACCES):
            as_user(user, call.run, "locked/f")
    assert read("locked/f") == b"data"


@pytest.mark.parametrize("call", UNPRIVILEGED_CREATIONS, ids=str)
@prepared(build_locked)
def test_nothing_is_made_in_a_directory_without_search_permission(root: Root, call: Call) -> None:
    with root.touches(locked=""), fails(errno.EACCES):
        as_user(OWNER, call.run, "locked/new")
    assert os.listdir("locked") == ["f"]


def build_unwritable() -> None:
    build_source()
    os.mkdir("fixed")
    write("fixed/f", b"data", 0o666)
    os.mkdir("fixed/d")
    os.chown("fixed", OWNER.uid, OWNER.gid)
    os.chmod("fixed", 0o555)
    os.chown("source", OWNER.uid, OWNER.gid)
    os.chmod(".", 0o777)


@pytest.mark.parametrize("call", UNPRIVILEGED_CREATIONS, ids=str)
@prepared(build_unwritable)
def test_nothing_is_made_in_a_directory_without_write_permission(root: Root, call: Call) -> None:
    with root.touches(fixed="", source=""), fails(errno.EACCES):
        as_user(OWNER, call.run, "fixed/new")
    assert sorted(os.listdir("fixed")) == ["d", "f"]


@pytest.mark.parametrize(("remove", "name"), [(os.unlink, "f"), (os.rmdir, "d")], ids=["unlink", "rmdir"])
@prepared(build_unwritable)
def test_nothing_is_removed_from_a_directory_without_write_permission(root: Root, remove: object, name: str) -> None:
    assert callable(remove)
    with root.touches(fixed=""), fails(errno.EACCES):
        as_user(OWNER, remove, f"fixed/{name}")
    with root.touches(fixed=""), fails(errno.EACCES):
        as_user(OWNER, os.rename, f"fixed/{name}", "new")
    assert sorted(os.listdir("fixed")) == ["d", "f"]


@prepared(build_unwritable)
def test_root_needs_no_permission_to_write_or_search(root: Root) -> None:
    os.chmod("fixed", 0)
    write("fixed/new", b"new", 0)
    assert read("fixed/new") == b"new"
    os.unlink("fixed/new")
    os.rmdir("fixed/d")
    assert os.listdir("fixed") == ["f"]


def build_existing(kind: str) -> None:
    build_source()
    make(kind, "f")


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_existing)
def test_what_exists_is_not_made_again(root: Root, kind: str) -> None:
    before = os.lstat("f")
    with root.touches(here="", f="", source=""):
        for call in CREATIONS:
            if call.name != BEYOND_BIND:
                with fails(errno.EEXIST):
                    call.run("f")
    assert os.lstat("f").st_ino == before.st_ino
    assert os.lstat("f").st_mode == before.st_mode
    assert sorted(os.listdir()) == ["f", "source"]


@pytest.mark.parametrize("kind", TYPES)
@prepared(build_existing)
def test_a_socket_is_not_bound_where_something_exists(root: Root, kind: str) -> None:
    with root.touches(here="", f=""), fails(errno.EADDRINUSE):
        next(one for one in CREATIONS if one.name == "bind").run("f")


@pytest.mark.parametrize("call", [one for one in CREATIONS if one.name != BEYOND_BIND], ids=str)
@prepared(build_directory)
def test_dot_and_dotdot_exist_already(root: Root, call: Call) -> None:
    allowed = {"rename-to": (errno.EBUSY, errno.EEXIST, errno.EXDEV), "link-to": (errno.EEXIST, errno.EXDEV)}
    with root.touches(here="", d=""):
        for name in (".", "..", "d/.", "d/..", "/"):
            with fails(*allowed.get(call.name, (errno.EEXIST, errno.EISDIR))):
                call.run(name)


@pytest.mark.parametrize("call", CREATIONS, ids=str)
@prepared(build_directory)
def test_only_mkdir_makes_a_name_with_a_trailing_slash(root: Root, call: Call) -> None:
    if call.name == "mkdir":
        call.run("d/new/")
        assert os.listdir("d") == ["new"]
        return
    with root.touches(d=""), fails(errno.ENOENT, errno.EISDIR, errno.ENOTDIR):
        call.run("d/new/")
    assert os.listdir("d") == []


@pytest.mark.parametrize("call", LOOKUPS, ids=str)
@prepared(build_source)
def test_a_trailing_slash_after_a_file_gives_enotdir(root: Root, call: Call) -> None:
    with root.touches(here="", source=""), fails(errno.ENOTDIR):
        call.run("source/")


def build_link_to_directory() -> None:
    os.mkdir("d")
    write("d/f", b"data")
    os.symlink("d", "link")
    os.symlink("../d", "d/up")


@prepared(build_link_to_directory)
def test_a_trailing_slash_follows_a_link_to_a_directory(root: Root) -> None:
    assert stat.S_ISLNK(os.lstat("link").st_mode)
    assert stat.S_ISDIR(os.lstat("link/").st_mode)
    with fails(errno.ENOTDIR):
        os.rmdir("link/")
    with fails(errno.ENOTDIR):
        os.unlink("link/")
    assert sorted(os.listdir("link/")) == ["f", "up"]


@prepared(build_link_to_directory)
def test_links_to_directories_are_passed_any_number_of_times(root: Root) -> None:
    assert read("link/up/up/../d/./up/f") == b"data"
    write("link/up/new", b"new")
    assert read("d/new") == b"new"
    os.rename("link/new", "d/up/newer")
    assert sorted(os.listdir("d")) == ["f", "newer", "up"]


def test_dotdot_of_the_mount_leads_out_of_it(root: Root) -> None:
    outside = os.stat(os.path.dirname(root.mount))
    inside = os.stat(f"{root.mount}/..")
    assert (inside.st_dev, inside.st_ino) == (outside.st_dev, outside.st_ino)


def build_tree() -> None:
    os.makedirs("a/b/c")


@prepared(build_tree)
def test_dotdot_is_the_directory_above(root: Root) -> None:
    for below, above in (("a/b/c", "a/b"), ("a/b", "a"), ("a", ".")):
        assert os.stat(f"{below}/..").st_ino == os.stat(above).st_ino
        assert os.path.samestat(os.stat(f"{below}/.."), os.stat(above))


# The calls of the C library where a bad address reaches the kernel, with the bad address in each place.
EFAULT_CALLS = {
    "open": ("open", calls.BAD_ADDRESS, os.O_RDONLY),
    "create": ("open", calls.BAD_ADDRESS, os.O_WRONLY | os.O_CREAT, 0o644),
    "chmod": ("chmod", calls.BAD_ADDRESS, 0o644),
    "chown": ("chown", calls.BAD_ADDRESS, 0, 0),
    "lchown": ("lchown", calls.BAD_ADDRESS, 0, 0),
    "truncate": ("truncate", calls.BAD_ADDRESS, 0),
    "mkdir": ("mkdir", calls.BAD_ADDRESS, 0o755),
    "mkfifo": ("mkfifo", calls.BAD_ADDRESS, 0o644),
    "mknod": ("mknod", calls.BAD_ADDRESS, stat.S_IFREG | 0o644, 0),
    "rmdir": ("rmdir", calls.BAD_ADDRESS),
    "unlink": ("unlink", calls.BAD_ADDRESS),
    "symlink-target": ("symlink", calls.BAD_ADDRESS, b"new"),
    "symlink-path": ("symlink", b"anything", calls.BAD_ADDRESS),
    "link-source": ("link", calls.BAD_ADDRESS, b"new"),
    "link-target": ("link", b"source", calls.BAD_ADDRESS),
    "rename-source": ("rename", calls.BAD_ADDRESS, b"new"),
    "rename-target": ("rename", b"source", calls.BAD_ADDRESS),
    "readlink": ("readlink", calls.BAD_ADDRESS, calls.BAD_ADDRESS, 10),
    "readlink-buffer": ("readlink", b"link", calls.BAD_ADDRESS, 10),
    "getxattr-buffer": ("getxattr", b"source", b"user.test", calls.BAD_ADDRESS, 10),
    "setxattr-value": ("setxattr", b"source", b"user.new", calls.BAD_ADDRESS, 10, 0),
    "utimensat": ("utimensat", calls.AT_FDCWD, calls.BAD_ADDRESS, None, 0),
}


def build_for_efault() -> None:
    build_source()
    os.setxattr("source", "user.test", b"value")
    os.symlink("source", "link")


@pytest.mark.parametrize("name", EFAULT_CALLS)
@prepared(build_for_efault)
def test_a_bad_address_gives_efault(root: Root, name: str) -> None:
    function, *arguments = EFAULT_CALLS[name]
    assert isinstance(function, str)
    with root.touches(here="", source=""), fails(errno.EFAULT):
        calls.call(function, *arguments)
    assert sorted(os.listdir()) == ["link", "source"]


def build_binary_names() -> None:
    for name in BINARY_NAMES:
        write(name, name)


BINARY_NAMES = (
    b"\xff\xfe",
    b"\x80",
    b"new\nline",
    b"tab\t",
    b" ",
    b"\\",
    b"*",
    b"\xc3\x28",
    b"-",
    b"a" * 255,
    b"\xf0" * 255,
)


@prepared(build_binary_names)
def test_names_hold_any_bytes(root: Root) -> None:
    assert sorted(os.listdir(b".")) == sorted(BINARY_NAMES)
    for name in BINARY_NAMES:
        assert read(name) == name
        write(name, b"changed")
        assert read(name) == b"changed"
        os.rename(name, b"\xfd")
        os.symlink(name, name)
        assert os.readlink(name) == name
        os.unlink(name)
        os.rename(b"\xfd", name)
        os.unlink(name)
    assert os.listdir() == []


@prepared(build_directory)
def test_names_differ_by_case_and_by_unicode_form(root: Root) -> None:
    names = ["Name", "name", "NAME", "\u00e9", "e\u0301"]
    for name in names:
        write(f"d/{name}", name.encode())
    assert sorted(os.listdir("d")) == sorted(names)
    assert [read(f"d/{name}") for name in names] == [name.encode() for name in names]


@pytest.mark.parametrize("length", [1, 100, 1000, 4095])
@prepared(build_directory)
def test_a_link_keeps_its_target_byte_for_byte(root: Root, length: int) -> None:
    target = b"\xfft/"[:length] + b"x" * max(0, length - 3)
    os.symlink(target, "d/link")
    assert os.readlink(b"d/link") == target
    assert os.lstat("d/link").st_size == length
    assert stat.S_IMODE(os.lstat("d/link").st_mode) == 0o777


@prepared(build_directory)
def test_a_link_target_of_4096_bytes_gives_enametoolong(root: Root) -> None:
    with root.touches(d=""), fails(errno.ENAMETOOLONG):
        os.symlink("x" * 4096, "d/link")
    with root.touches(d=""), fails(errno.ENOENT):
        os.symlink("", "d/link")


def test_a_tree_goes_deeper_than_path_max(root: Root) -> None:
    with inside("."):
        for _ in range(LEVELS):
            os.mkdir(LONG)
            os.chdir(LONG)
        write("f", b"at the bottom")
        os.rename("f", "g")
        os.link("g", "h")
        os.unlink("g")
        os.setxattr("h", "user.depth", b"yes")
        assert read("h") == b"at the bottom"
        assert os.getxattr("h", "user.depth") == b"yes"
        os.unlink("h")
        for _ in range(LEVELS):
            os.chdir("..")
            os.rmdir(LONG)
    assert os.listdir() == []


LONG = "deep" * 50
LEVELS = 30  # so that a path to the bottom is longer than PATH_MAX


def build_deep() -> None:
    with inside("."):
        for _ in range(LEVELS):
            os.mkdir(LONG)
            os.chdir(LONG)
        write("f", b"lower")


@prepared(build_deep)
def test_a_file_deeper_than_path_max_is_changed_and_removed(root: Root) -> None:
    with inside("."):
        for _ in range(LEVELS):
            os.chdir(LONG)
        with opened("f", os.O_WRONLY | os.O_APPEND) as descriptor:
            os.write(descriptor, b" and more")
        assert read("f") == b"lower and more"
        os.rename("f", "g")
        os.unlink("g")
        assert os.listdir() == []
        for _ in range(LEVELS):
            os.chdir("..")
            os.rmdir(LONG)
    assert os.listdir() == []
