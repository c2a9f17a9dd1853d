"""A read-only mount: everything can be looked at, and whatever would change something gives EROFS."""

import errno
import os
import socket
import stat

import pytest

from tests.posix.files import CALLS, CREATIONS, TYPES, Call, kind_of, make
from tests.posix.rig import OTHER, Root, as_user, fails, opened, prepared, read, write

pytestmark = pytest.mark.flavour("read-only")


def build() -> None:
    os.chmod(".", 0o777)
    for kind in TYPES:
        make(kind, kind)
    write("source", b"source", 0o666)
    os.setxattr("source", "user.test", b"value")
    os.mkdir("empty")
    os.chmod("empty", 0o777)


TARGETS = {
    "rmdir": "empty",
    "open-for-writing": "source",
    "open-to-truncate": "source",
    "rename-to": "new",
}


@pytest.mark.parametrize("call", [one for one in CALLS if one.changes], ids=str)
@prepared(build)
def test_a_change_gives_erofs(root: Root, call: Call) -> None:
    path = TARGETS.get(call.name, "new" if call in CREATIONS else "source")
    assert os.statvfs(".").f_flag & os.ST_RDONLY
    allowed = (errno.EROFS, errno.EPERM, errno.EACCES) if call.name in DOUBTFUL else (errno.EROFS,)
    with root.touches(here="", source="", empty=""):
        with fails(errno.EROFS):
            call.run(path)
        with fails(*allowed):
            as_user(OTHER, call.run, path)
    assert kind_of("new") == "missing"


# For these the kernel looks at the rights of a user before it looks at the mount.
DOUBTFUL = (
    "mknod-char",
    "mknod-block",
    "chmod",
    "chown",
    "lchown",
    "utimensat",
    "utimensat-of-link",
    "link-from",
    "link-to",
)


@prepared(build)
def test_everything_is_readable(root: Root) -> None:
    assert sorted(os.listdir()) == sorted([*TYPES, "empty", "source"])
    assert read("source") == b"source"
    assert os.readlink("symlink") == "target"
    assert os.getxattr("source", "user.test") == b"value"
    for kind in TYPES:
        assert kind_of(kind) == kind
    with opened("source", os.O_RDONLY | os.O_CREAT) as descriptor:
        os.fsync(descriptor)
        with fails(errno.EROFS, errno.EBADF):
            os.fchmod(descriptor, 0o600)
        with fails(errno.EROFS):
            os.setxattr(descriptor, "user.a", b"x")


@prepared(build)
def test_access_for_writing_gives_erofs_for_files_alone(root: Root) -> None:
    assert not os.access("source", os.W_OK)
    assert not os.access("empty", os.W_OK)
    assert os.access("char", os.W_OK)
    assert os.access("source", os.R_OK)


@prepared(build)
def test_fifos_and_devices_stay_usable(root: Root) -> None:
    with opened("char", os.O_RDWR) as descriptor:
        assert os.write(descriptor, b"gone") == 4
    with opened("fifo", os.O_RDWR) as descriptor:
        os.write(descriptor, b"through")
        assert os.read(descriptor, 10) == b"through"
    with socket.socket(socket.AF_UNIX) as client, fails(errno.ECONNREFUSED):
        client.connect("socket")


@prepared(build)
def test_creating_what_exists_tells_so(root: Root) -> None:
    for name in ("source", "empty", "symlink"):
        with fails(errno.EEXIST):
            os.mkdir(name)
        with fails(errno.EEXIST):
            os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    # Removing tells first that the mount is read-only.
    with fails(errno.EROFS):
        os.unlink("missing")
    assert stat.S_ISDIR(os.stat("empty").st_mode)
