"""Labels that come with a request: stored with what is made, in one step, and nothing but well-formed ones.

Source: struct fuse_secctx_header, struct fuse_secctx, struct fuse_ext_header in include/uapi/linux/fuse.h.
"""

import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native import wire
from tests.native.messages import label, labels, lay_out
from tests.native.wire import Wire, served
from tests.support.mounts import our_mount

SELINUX = b"security.selinux"
CONTEXT = b"system_u:object_r:container_file_t:s0\0"
GROUPS = struct.pack("=IIII", 16, 32, 1, 7)
MAKERS = {
    "mkdir": (wire.MKDIR, struct.pack("=II", 0o755, 0) + b"new\0"),
    "mknod": (wire.MKNOD, struct.pack("=IIII", 0o100644, 0, 0, 0) + b"new\0"),
    "fifo": (wire.MKNOD, struct.pack("=IIII", 0o010644, 0, 0, 0) + b"new\0"),
    "symlink": (wire.SYMLINK, b"new\0some/where\0"),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    lay_out(tmp_path)
    return tmp_path


@pytest.fixture
def client(base: Path) -> Iterator[Wire]:
    with served(base, security_label=True) as connected:
        yield connected


@pytest.mark.parametrize("maker", sorted(MAKERS))
@pytest.mark.parametrize("uid", [0, 12])
def test_what_is_made_has_the_label_that_came_with_it(client: Wire, base: Path, maker: str, uid: int) -> None:
    opcode, body = MAKERS[maker]
    answer = client.ask(opcode, 1, body, uid=uid, gid=uid, extensions=labels(label(SELINUX, CONTEXT)))
    assert answer.error == 0
    made = base / "upper" / "new"
    assert os.getxattr(made, SELINUX, follow_symlinks=False) == CONTEXT
    assert (made.lstat().st_uid, made.lstat().st_gid) == (uid, uid)
    assert os.listdir(base / "work" / "work") == []
    got = client.ask(wire.GETXATTR, answer.unpack("Q120x")[0], struct.pack("=II", 100, 0) + SELINUX + b"\0")
    assert got.body == CONTEXT


def test_a_file_made_by_opening_it_has_its_label(base: Path) -> None:
    with served(base, security_label=True, io="passthrough", flags2=0xFFFFFFFF) as client:
        body = struct.pack("=IIII", 0o102, 0o100644, 0, 0) + b"new\0"
        assert client.ask(wire.CREATE, 1, body, extensions=labels(label(SELINUX, CONTEXT))).error == 0
        assert os.getxattr(base / "upper" / "new", SELINUX) == CONTEXT


def test_a_file_without_a_name_has_its_label(client: Wire) -> None:
    body = struct.pack("=IIII", 0o20200002, 0o100600, 0, 0) + b"t\0"
    answer = client.ask(wire.TMPFILE, 1, body, extensions=labels(label(SELINUX, CONTEXT)))
    node = answer.unpack("Q136x")[0]
    assert client.ask(wire.GETXATTR, node, struct.pack("=II", 100, 0) + SELINUX + b"\0").body == CONTEXT


@pytest.mark.parametrize("minor", [36, 37, 38])
def test_labels_follow_the_names_of_kernels_whose_header_does_not_count_them(base: Path, minor: int) -> None:
    everything = 0xFFFFFFFF
    with served(base, greet=False, security_label=True, io="passthrough") as client:
        assert client.ask(wire.INIT, 0, wire.init_body(minor, everything, everything)).error == 0
        create = (wire.CREATE, struct.pack("=IIII", 0o102, 0o100644, 0, 0) + b"new\0")
        units = None if minor >= 38 else 0
        for number, (opcode, body) in enumerate((*MAKERS.values(), create)):
            name = b"n%02d" % number
            body = body.replace(b"new", name)
            assert client.ask(opcode, 1, body, extensions=labels(), units=units).error == 0
            assert SELINUX.decode() not in os.listxattr(base / "upper" / os.fsdecode(name), follow_symlinks=False)
            body = body.replace(name, b"l%02d" % number)
            extensions = labels(label(SELINUX, CONTEXT))
            assert client.ask(opcode, 1, body, extensions=extensions, units=units).error == 0
            assert os.getxattr(base / "upper" / f"l{number:02}", SELINUX, follow_symlinks=False) == CONTEXT
            wrong = WRONG["a key that is no label"]
            body = body.replace(b"l%02d" % number, b"bad")
            assert client.ask(opcode, 1, body, extensions=wrong, units=units).error == errno.EIO
            assert not os.path.lexists(base / "upper" / "bad")
        body = struct.pack("=IIII", 0o20200002, 0o100600, 0, 0) + b"/\0"
        answer = client.ask(wire.TMPFILE, 1, body, extensions=labels(label(SELINUX, CONTEXT)), units=units)
        node = answer.unpack("Q136x")[0]
        assert client.ask(wire.GETXATTR, node, struct.pack("=II", 100, 0) + SELINUX + b"\0").body == CONTEXT


def test_several_labels_and_other_extensions_beside_them(client: Wire, base: Path) -> None:
    both = labels(label(SELINUX, CONTEXT), label(b"security.other", b"x"))
    for number, extensions in enumerate((both + GROUPS, GROUPS + both)):
        body = struct.pack("=II", 0o755, 0) + b"new%d\0" % number
        assert client.ask(wire.MKDIR, 1, body, extensions=extensions).error == 0
        made = base / "upper" / f"new{number}"
        assert os.getxattr(made, "security.other") == b"x"
        assert os.getxattr(made, SELINUX) == CONTEXT


@pytest.mark.parametrize("extensions", [b"", labels(), GROUPS, labels() + GROUPS])
def test_what_comes_without_a_label_has_none(client: Wire, base: Path, extensions: bytes) -> None:
    opcode, body = MAKERS["mkdir"]
    assert client.ask(opcode, 1, body, extensions=extensions).error == 0
    assert os.listxattr(base / "upper" / "new") in ([], ["trusted.overlay.opaque"])


WRONG = {
    "a record of no size": struct.pack("=II", 0, 1) + bytes(8),
    "a record smaller than its head": struct.pack("=II", 4, 32) + bytes(8),
    "a record longer than all": struct.pack("=II", 24, 32) + bytes(8),
    "a record of no multiple of eight": struct.pack("=II", 12, 32) + bytes(8),
    "no record, but zeros": bytes(8),
    "more labels than there are": struct.pack("=II", 8, 1),
    "fewer labels than there are": struct.pack("=II", 8 + len(label(SELINUX, b"x")), 0) + label(SELINUX, b"x"),
    "a label longer than its record": struct.pack("=II", 40, 1) + struct.pack("=II", 99, 0) + SELINUX + bytes(8),
    "a label of 4 GiB": struct.pack("=II", 40, 1) + struct.pack("=II", 0xFFFFFFFF, 0) + SELINUX + bytes(8),
    "a key that doesn't end": struct.pack("=II", 32, 1) + struct.pack("=II", 0, 0) + SELINUX,
    "a key of nothing": labels(label(b"", b"x")),
    "a key too long": labels(label(b"security." + b"k" * 247, b"x")),
    "a key that is no label": labels(label(b"user.key", b"x")),
    "a mark of the overlay": labels(label(b"trusted.overlay.opaque", b"y")),
    "labels twice": labels(label(SELINUX, b"x")) * 2,
}


@pytest.mark.parametrize("what", sorted(WRONG))
@pytest.mark.parametrize("maker", sorted(MAKERS))
def test_labels_that_make_no_sense_are_refused_and_nothing_is_made(
    client: Wire, base: Path, maker: str, what: str
) -> None:
    opcode, body = MAKERS[maker]
    assert client.ask(opcode, 1, body, extensions=WRONG[what]).error == errno.EIO
    assert not os.path.lexists(base / "upper" / "new")
    assert os.listdir(base / "work" / "work") == []
    client.serves()


def test_labels_are_taken_only_where_they_were_agreed_on(base: Path) -> None:
    opcode, body = MAKERS["mkdir"]
    with served(base) as client:
        assert client.ask(opcode, 1, body, extensions=labels(label(SELINUX, CONTEXT))).error == 0
    assert SELINUX.decode() not in os.listxattr(base / "upper" / "new")


@pytest.mark.parametrize("asked", [True, False])
def test_init_agrees_on_labels_where_the_option_asks_for_them(base: Path, asked: bool) -> None:
    with served(base, greet=False, security_label=asked) as client:
        fields = client.ask(wire.INIT, 0, wire.init_body(45, 0xFFFFFFFF, 0xFFFFFFFF)).unpack("IIIIHHIIHHIIHH20x")
        assert bool(fields[10] & 1) == asked, "SECURITY_CTX"
        assert not fields[10] & 4, "CREATE_SUPP_GROUP"


def test_everything_can_be_made_in_a_mount_that_asks_for_labels(base: Path, uring: str) -> None:
    """The kernel sends the extension, if only to say that there is no label."""
    mnt = base / "mnt"
    mnt.mkdir()
    options = f"engine=native,security_label,uring={uring}"
    with our_mount(mnt, [base / "lower"], base / "upper", base / "work", options):
        (mnt / "dir").mkdir()
        (mnt / "file").write_bytes(b"data")
        (mnt / "link").symlink_to("file")
        os.mkfifo(mnt / "fifo")
        os.close(os.open(mnt, os.O_TMPFILE | os.O_RDWR, 0o600))
        assert (mnt / "file").read_bytes() == b"data"
        assert os.readlink(mnt / "link") == "file"
        assert stat.S_ISFIFO((mnt / "fifo").stat().st_mode)
