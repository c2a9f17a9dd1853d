"""Each opcode byte by byte: what is asked, as the kernel writes it, and what is answered, field by field.

Source: include/uapi/linux/fuse.h, protocol 7.45. Numbers are written out here, so that a wrong one in the engine's own
declarations shows.
"""

import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs_py.engines import machine
from tests.native import wire
from tests.native.messages import lay_out, setattr_body, valid
from tests.native.test_inodes import born as when_born
from tests.native.wire import Answer, Wire, served

FOREVER = (1 << 64) - 1
ENTRY = "QQQQII"
ATTR = "QQQQQQIIIIIIIIII"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    lay_out(tmp_path)
    return tmp_path


@pytest.fixture
def client(base: Path) -> Iterator[Wire]:
    with served(base) as connected:
        yield connected


def shown(node: int, st: os.stat_result) -> tuple[int, ...]:
    """struct fuse_attr of an object that the mount shows as its layer has it."""
    seconds = [value // 10**9 for value in (st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns)]
    rest = [value % 10**9 for value in (st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns)]
    rdev = os.major(st.st_rdev) << 8 | os.minor(st.st_rdev)
    owner = (st.st_mode, st.st_nlink, st.st_uid, st.st_gid, rdev, st.st_blksize, 0)
    return (node, st.st_size, st.st_blocks, *seconds, *rest, *owner)


def check_entry(answer: Answer, path: Path) -> int:
    """See that an answer is the entry of what is at `path`; the node id."""
    node, generation, *valid = answer.unpack(ENTRY + ATTR)[:6]
    assert node > 1
    assert bool(generation) == ("upper" in path.parts), "what a lower layer numbers needs none"
    assert valid == [FOREVER, FOREVER, 0, 0]
    assert answer.unpack(ENTRY + ATTR)[6:] == shown(node, path.lstat())
    return int(node)


def test_the_bytes_of_one_whole_exchange(base: Path) -> None:
    with served(base, greet=False) as client:
        # 104 bytes, opcode INIT, number 0x11, node 0, of root, process 1; 7.45, 128 KiB ahead, INIT_EXT.
        client.send(
            bytes.fromhex(
                "68000000 1a000000 1100000000000000 0000000000000000 00000000 00000000 01000000 0000 0000"
                "07000000 2d000000 00000200 00000040 00000000" + 11 * "00000000"
            )
        )
        message = client.receive()
        # 80 bytes, no error, number 0x11; 7.45, as far ahead, the flags both know.
        assert message[:32] == bytes.fromhex("50000000 00000000 1100000000000000 07000000 2d000000 00000200 00000040")
        assert len(message) == 80
        # 42 bytes, opcode LOOKUP, number 0x2222, node 1: "x"
        client.send(
            bytes.fromhex(
                "2a000000 01000000 2222000000000000 0100000000000000 00000000 00000000 01000000 0000 0000 7800"
            )
        )
        # That there is none, for ever.
        absent = "0000000000000000 0000000000000000 ffffffffffffffff 0000000000000000" + 6 * 16 * "00"
        assert client.receive() == bytes.fromhex("90000000 00000000 2222000000000000" + absent)
        # 41 bytes, opcode RMDIR, number 0x3333, node 1, without a name
        client.send(
            bytes.fromhex("29000000 0b000000 3333000000000000 0100000000000000 00000000 00000000 01000000 0000 0000 00")
        )
        refused = client.receive()
        assert refused[:4] == bytes.fromhex("10000000") and refused[8:] == bytes.fromhex("3333000000000000")
        assert struct.unpack("=i", refused[4:8])[0] < 0


@pytest.mark.parametrize("minor", [31, 35, 36, 45, 46, 99])
def test_init_agrees_on_the_lesser_version(base: Path, minor: int) -> None:
    body = wire.init_body(minor, 0xFFFFFFFF, 0xFFFFFFFF)
    if minor < 36:
        body = wire.init_body(minor, 0x3FFFFFFF)[:16]
    with served(base, greet=False, max_write=65536) as client:
        fields = client.ask(wire.INIT, 0, body).unpack("IIIIHHIIHHIIHH20x")
        major, agreed, ahead, flags, background, congestion, max_write, gran, pages, _, flags2, *_ = fields
        assert (major, agreed, ahead) == (7, min(minor, 45), 131072)
        # Zero-message opens are NO_OPEN_SUPPORT and NO_OPENDIR_SUPPORT.
        assert flags & (1 << 17) and flags & (1 << 24)
        assert flags & (1 << 22), "MAX_PAGES"
        assert bool(flags & (1 << 30)) == (minor >= 36), "INIT_EXT"
        if minor < 36:
            assert flags2 == 0
        assert not flags2 & (1 << 9), "FUSE over io_uring was not asked for"
        assert 0 < congestion <= background
        assert (max_write, gran) == (65536, 1)
        assert pages * 4096 >= max_write
        client.serves()


def test_init_takes_up_nothing_that_was_not_offered(base: Path) -> None:
    with served(base, greet=False) as client:
        fields = client.ask(wire.INIT, 0, wire.init_body(45, 0, 0)).unpack("IIIIHHIIHHIIHH20x")
        assert (fields[3], fields[10]) == (0, 0)
        client.serves()


@pytest.mark.parametrize(("asked", "auto"), [("on", False), ("auto", True)])
def test_init_leaves_to_the_kernel_when_listings_carry_attributes_where_that_is_asked_for(
    base: Path, asked: str, auto: bool
) -> None:
    with served(base, greet=False, readdirplus=asked) as client:
        flags = client.ask(wire.INIT, 0, wire.init_body()).unpack("IIIIHHIIHHIIHH20x")[3]
        assert flags & 1 << 13, "READDIRPLUS"
        assert bool(flags & 1 << 14) == auto, "READDIRPLUS_AUTO"


def test_flags_behind_a_missing_init_ext_are_not_read(base: Path) -> None:
    with served(base, greet=False) as client:
        fields = client.ask(wire.INIT, 0, wire.init_body(45, 0xBFFFFFFF, 0xFFFFFFFF)).unpack("IIIIHHIIHHIIHH20x")
        assert fields[10] == 0


@pytest.mark.parametrize(("major", "minor"), [(6, 45), (8, 0), (0, 0), (7, 30), (7, 0), (0xFFFFFFFF, 45)])
def test_init_of_another_major_or_an_older_minor_version_is_eproto(base: Path, major: int, minor: int) -> None:
    with served(base, greet=False) as client:
        assert client.ask(wire.INIT, 0, wire.init_body(minor, major=major)).error == errno.EPROTO


def test_lookup(client: Wire, base: Path) -> None:
    check_entry(client.ask(1, 1, b"f\0"), base / "lower" / "f")
    check_entry(client.ask(1, 1, b"u\0"), base / "upper" / "u")
    check_entry(client.ask(1, 1, b"l\0"), base / "lower" / "l")
    check_entry(client.ask(1, 1, b"c\0"), base / "upper" / "c")
    d = client.look_up(b"d")
    check_entry(client.ask(1, d, b"below\0"), base / "lower" / "d" / "below")
    check_entry(client.ask(1, d, b"above\0"), base / "upper" / "d" / "above")
    assert client.ask(1, d, b"none\0").unpack(ENTRY + ATTR) == (0, 0, FOREVER, *[0] * 19)


def test_forget_and_batch_forget_count_look_ups(client: Wire) -> None:
    f, u = client.look_up(b"f"), client.look_up(b"u")
    assert client.look_up(b"f") == f
    client.tell(2, f, struct.pack("=Q", 1))
    assert client.ask(3, f, bytes(16)).error == 0
    client.tell(42, 0, struct.pack("=II", 2, 0) + struct.pack("=QQ", f, 1) + struct.pack("=QQ", u, 1))
    assert client.ask(3, f, bytes(16)).error == errno.ESTALE
    assert client.ask(3, u, bytes(16)).error == errno.ESTALE


def test_getattr(client: Wire, base: Path) -> None:
    u = client.look_up(b"u")
    fields = client.ask(3, u, struct.pack("=IIQ", 0, 0, 0)).unpack("QII" + ATTR)
    assert fields == (FOREVER, 0, 0, *shown(u, (base / "upper" / "u").stat()))
    root = client.ask(3, 1, struct.pack("=IIQ", 1, 0, 77)).unpack("QII" + ATTR)
    assert root[3] == 1 and stat.S_ISDIR(root[12])


def test_statx(client: Wire, base: Path) -> None:
    u, path = client.look_up(b"u"), base / "upper" / "u"
    st = path.stat()
    layout = "QII16x" + "IIQIIIH2xQQQQ" + 4 * "qI4x" + "IIII112x"
    fields = client.ask(52, u, struct.pack("=IIQII", 0, 0, 0, 0, 0xFFF)).unpack(layout)
    assert fields[:3] == (FOREVER, 0, 0)
    mask, block, attributes, nlink, uid, gid, mode, ino, size, blocks, known = fields[3:14]
    assert (mask, block, attributes, known) == (0xFFF, st.st_blksize, 0, 0)
    assert (nlink, uid, gid, mode) == (st.st_nlink, st.st_uid, st.st_gid, st.st_mode)
    assert (ino, size, blocks) == (u, st.st_size, st.st_blocks)
    accessed, born, changed, modified = (fields[at] * 10**9 + fields[at + 1] for at in range(14, 22, 2))
    assert (accessed, modified, changed) == (st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns)
    assert born // 10**9 == int(when_born(path))
    assert fields[22:24] == (0, 0), "the device that it is"


def test_setattr(client: Wire, base: Path) -> None:
    u = client.look_up(b"u")
    upper = base / "upper" / "u"
    body = setattr_body(valid=0x1 | 0x8 | 0x10 | 0x20, size=3, atime=5, mtime=7, mode=0o640)
    fields = client.ask(4, u, body).unpack("QII" + ATTR)
    assert fields == (FOREVER, 0, 0, *shown(u, upper.stat()))
    st = upper.stat()
    assert (st.st_size, st.st_atime, st.st_mtime, stat.S_IMODE(st.st_mode)) == (3, 5, 7, 0o640)
    client.ask(4, u, setattr_body(valid=0x2 | 0x4, uid=12, gid=34)).unpack("QII" + ATTR)
    assert (upper.stat().st_uid, upper.stat().st_gid) == (12, 34)
    # Two's complement: a second before 1970.
    client.ask(4, u, setattr_body(valid=0x20, mtime=FOREVER)).unpack("QII" + ATTR)
    assert upper.stat().st_mtime == -1
    # ATIME_NOW and MTIME_NOW
    client.ask(4, u, setattr_body(valid=0x10 | 0x20 | 0x80 | 0x100)).unpack("QII" + ATTR)
    assert upper.stat().st_mtime > 1_000_000_000


def test_setattr_copies_a_lower_file_up(client: Wire, base: Path) -> None:
    f = client.look_up(b"f")
    client.ask(4, f, setattr_body(valid=0x1, mode=0o600)).unpack("QII" + ATTR)
    assert stat.S_IMODE((base / "upper" / "f").stat().st_mode) == 0o600
    assert (base / "upper" / "f").read_bytes() == b"of the lower layer"


def test_readlink(client: Wire) -> None:
    assert client.ask(5, client.look_up(b"l")).body == b"d/below"


def test_symlink(client: Wire, base: Path) -> None:
    check_entry(client.ask(6, 1, b"s\0to/there\0"), base / "upper" / "s")
    assert os.readlink(base / "upper" / "s") == "to/there"


def test_mknod(client: Wire, base: Path) -> None:
    check_entry(client.ask(8, 1, struct.pack("=IIII", 0o100666, 0, 0o027, 0) + b"n\0"), base / "upper" / "n")
    assert (base / "upper" / "n").stat().st_mode == 0o100640
    # The kernel's new_encode_dev: the minor number's low 8 bits, the major's 12, the minor's other 12.
    check_device = struct.pack("=IIII", 0o060600, 0x12345 << 12 & 0xFFF00000 | 0x7 << 8 | 0x45, 0, 0)
    answer = client.ask(8, 1, check_device + b"dev\0")
    st = (base / "upper" / "dev").stat()
    assert (os.major(st.st_rdev), os.minor(st.st_rdev)) == (7, 0x12345 & 0xFFF00 | 0x45)
    assert answer.unpack(ENTRY + ATTR)[19] == 0x12345 << 12 & 0xFFF00000 | 0x7 << 8 | 0x45


def test_mknod_gives_what_it_makes_to_the_caller(client: Wire, base: Path) -> None:
    client.ask(8, 1, struct.pack("=IIII", 0o100666, 0, 0, 0) + b"n\0", uid=12, gid=34).unpack(ENTRY + ATTR)
    st = (base / "upper" / "n").stat()
    assert (st.st_uid, st.st_gid) == (12, 34)


def test_mkdir(client: Wire, base: Path) -> None:
    answer = client.ask(9, 1, struct.pack("=II", 0o777, 0o022) + b"m\0")
    node = answer.unpack(ENTRY + ATTR)[0]
    assert answer.unpack(ENTRY + ATTR)[6:] == shown(node, (base / "upper" / "m").stat())
    assert (base / "upper" / "m").stat().st_mode == 0o040755
    assert client.ask(9, 1, struct.pack("=II", 0o777, 0o022) + b"m\0").error == errno.EEXIST


def test_unlink_and_rmdir(client: Wire, base: Path) -> None:
    assert client.ask(10, 1, b"f\0") == Answer(0, b"")
    assert stat.S_ISCHR((base / "upper" / "f").stat().st_mode)
    assert client.ask(10, 1, b"f\0").error == errno.ENOENT
    assert client.ask(10, 1, b"d\0").error == errno.EISDIR
    assert client.ask(11, 1, b"d\0").error == errno.ENOTEMPTY
    assert client.ask(11, 1, b"u\0").error == errno.ENOTDIR
    client.ask(9, 1, struct.pack("=II", 0o777, 0o022) + b"m\0")
    assert client.ask(11, 1, b"m\0") == Answer(0, b"")


def test_rename(client: Wire, base: Path) -> None:
    d = client.look_up(b"d")
    assert client.ask(12, 1, struct.pack("=Q", d) + b"u\0moved\0") == Answer(0, b"")
    assert (base / "upper" / "d" / "moved").read_bytes() == b"of the upper layer"


def test_rename2_with_its_flags(client: Wire, base: Path) -> None:
    d = client.look_up(b"d")
    noreplace = struct.pack("=QII", d, 1, 0)
    assert client.ask(45, 1, noreplace + b"u\0above\0").error == errno.EEXIST
    exchange = struct.pack("=QII", d, 2, 0)
    assert client.ask(45, 1, exchange + b"u\0above\0") == Answer(0, b"")
    assert (base / "upper" / "u").read_bytes() == b"above"
    assert (base / "upper" / "d" / "above").read_bytes() == b"of the upper layer"
    unknown = struct.pack("=QII", d, 1 << 31, 0)
    assert client.ask(45, 1, unknown + b"u\0above\0").error == errno.EINVAL


def test_link(client: Wire, base: Path) -> None:
    u = client.look_up(b"u")
    answer = client.ask(13, 1, struct.pack("=Q", u) + b"h\0")
    assert answer.unpack(ENTRY + ATTR)[0] == u
    assert (base / "upper" / "h").stat().st_nlink == 2
    assert answer.unpack(ENTRY + ATTR)[16] == 2


def test_read(client: Wire) -> None:
    f = client.look_up(b"f")
    assert client.ask(15, f, struct.pack("=QQIIQII", 0, 3, 9, 0, 0, 0, 0)) == Answer(0, b"the lower")
    assert client.ask(15, f, struct.pack("=QQIIQII", 0, 18, 9, 0, 0, 0, 0)) == Answer(0, b"")


def test_write(client: Wire, base: Path) -> None:
    f, u = client.look_up(b"f"), client.look_up(b"u")
    assert client.ask(16, u, struct.pack("=QQIIQII", 0, 20, 4, 0, 0, 0, 0) + b"more").unpack("II") == (4, 0)
    assert (base / "upper" / "u").read_bytes() == b"of the upper layer\0\0more"
    # Copied up first.
    assert client.ask(16, f, struct.pack("=QQIIQII", 0, 0, 2, 0, 0, 0, 0) + b"OF").unpack("II") == (2, 0)
    assert (base / "upper" / "f").read_bytes() == b"OF the lower layer"


def test_a_write_of_the_greatest_size(client: Wire, base: Path) -> None:
    u = client.look_up(b"u")
    data = os.urandom(1 << 20)
    assert client.ask(16, u, struct.pack("=QQIIQII", 0, 0, 1 << 20, 0, 0, 0, 0) + data).unpack("II") == (1 << 20, 0)
    assert client.ask(15, u, struct.pack("=QQIIQII", 0, 0, 1 << 20, 0, 0, 0, 0)) == Answer(0, data)


@pytest.mark.parametrize(("limit", "most"), [(None, 1 << 20), (256, 1 << 20), (512, 2 << 20), (1 << 20, 3 << 20)])
def test_an_option_asks_for_writes_as_great_as_the_machine_allows(
    base: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, most: int
) -> None:
    monkeypatch.setattr(machine, "most_pages", lambda: limit)
    with served(base, greet=False, max_write=(3 << 20) + 1) as client:
        fields = client.ask(wire.INIT, 0, wire.init_body()).unpack("IIIIHHIIHHIIHH20x")
        assert (fields[6], fields[8]) == (most, most // 4096)
        u = client.look_up(b"u")
        data = os.urandom(most)
        assert client.ask(16, u, struct.pack("=QQIIQII", 0, 0, most, 0, 0, 0, 0) + data).unpack("II") == (most, 0)
        assert client.ask(15, u, struct.pack("=QQIIQII", 0, 0, most, 0, 0, 0, 0)) == Answer(0, data)


def test_a_write_told_to_takes_set_id_bits(client: Wire, base: Path) -> None:
    os.chmod(base / "upper" / "u", 0o6777)
    u = client.look_up(b"u")
    client.ask(16, u, struct.pack("=QQIIQII", 0, 0, 2, 0, 0, 0, 0) + b"OF").unpack("II")
    assert stat.S_IMODE((base / "upper" / "u").stat().st_mode) & 0o6000
    client.ask(16, u, struct.pack("=QQIIQII", 0, 0, 2, 4, 0, 0, 0) + b"OF").unpack("II")
    assert stat.S_IMODE((base / "upper" / "u").stat().st_mode) == 0o777


def test_statfs(client: Wire, base: Path) -> None:
    st = os.statvfs(base / "upper")
    fields = client.ask(17, 1).unpack("QQQQQIIII24x")
    assert (fields[0], fields[5], fields[6], fields[7], fields[8]) == (
        st.f_blocks,
        st.f_bsize,
        st.f_namemax,
        st.f_frsize,
        0,
    )


@pytest.mark.parametrize("opcode", [18, 29])
def test_release_and_releasedir_are_answered_with_nothing(client: Wire, opcode: int) -> None:
    assert client.ask(opcode, 1, struct.pack("=QIIQ", 0, 0, 0, 0)) == Answer(0, b"")


@pytest.mark.parametrize("data_only", [0, 1])
def test_fsync_fsyncdir_and_syncfs(client: Wire, data_only: int) -> None:
    assert client.ask(20, client.look_up(b"u"), struct.pack("=QII", 0, data_only, 0)) == Answer(0, b"")
    assert client.ask(20, client.look_up(b"f"), struct.pack("=QII", 0, data_only, 0)) == Answer(0, b"")
    assert client.ask(30, client.look_up(b"d"), struct.pack("=QII", 0, data_only, 0)) == Answer(0, b"")
    assert client.ask(50, 1, bytes(8)) == Answer(0, b"")


def test_xattrs(client: Wire, base: Path) -> None:
    u = client.look_up(b"u")
    size, get = struct.pack("=II", 0, 0), struct.pack("=II", 5, 0)
    assert client.ask(22, u, size + b"user.key\0").unpack("II") == (5, 0)
    assert client.ask(22, u, get + b"user.key\0") == Answer(0, b"value")
    assert client.ask(22, u, struct.pack("=II", 4, 0) + b"user.key\0").error == errno.ERANGE
    assert client.ask(22, u, get + b"user.none\0").error == errno.ENODATA
    assert client.ask(22, u, get + b"security.none\0").error == errno.ENODATA
    create, replace = struct.pack("=IIII", 3, 1, 0, 0), struct.pack("=IIII", 3, 2, 0, 0)
    assert client.ask(21, u, create + b"user.key\0new").error == errno.EEXIST
    assert client.ask(21, u, replace + b"user.key\0new") == Answer(0, b"")
    assert client.ask(21, u, replace + b"user.none\0new").error == errno.ENODATA
    assert os.getxattr(base / "upper" / "u", "user.key") == b"new"
    length = client.ask(23, u, size).unpack("II")[0]
    assert b"user.key\0" in client.ask(23, u, struct.pack("=II", length, 0)).body
    assert client.ask(23, u, struct.pack("=II", length - 1, 0)).error == errno.ERANGE
    assert client.ask(24, u, b"user.key\0") == Answer(0, b"")
    assert client.ask(24, u, b"user.key\0").error == errno.ENODATA


def test_opendir_is_never_to_be_asked_for_again(client: Wire) -> None:
    assert client.ask(27, 1, struct.pack("=II", 0o200000, 0)).error == errno.ENOSYS


def test_opendir_is_asked_for_where_layers_may_change(base: Path) -> None:
    with served(base, timeout=1.5) as client:
        assert client.ask(27, 1, struct.pack("=II", 0o200000, 0)).unpack("QII")[0] == 0
        assert client.ask(1, 1, b"f\0").unpack(ENTRY + ATTR)[2:6] == (1, 1, 500_000_000, 500_000_000)


NAMES = {b".": 4, b"..": 4, b"f": 8, b"u": 8, b"d": 4, b"l": 10, b"p": 1, b"c": 2}


def test_readdir(client: Wire) -> None:
    answer = client.ask(28, 1, struct.pack("=QQIIQII", 0, 0, 4096, 0, 0, 0, 0))
    found = wire.entries(answer.body)
    assert {entry.name: entry.kind for entry in found} == NAMES
    assert [entry.position for entry in found][:2] == [1, 2]
    assert [entry.position for entry in found] == sorted(entry.position for entry in found)
    # Without a reference, so its number alone.
    assert {entry.name: entry.inode for entry in found}[b"f"] == client.look_up(b"f")


def test_readdirplus_counts_a_look_up_for_all_but_the_dots(client: Wire) -> None:
    answer = client.ask(44, 1, struct.pack("=QQIIQII", 0, 0, 4096, 0, 0, 0, 0))
    found = {entry.name: entry for entry in wire.entries(answer.body, plus=True)}
    assert {name: entry.kind for name, entry in found.items()} == NAMES
    assert found[b"."].node == found[b".."].node == 0
    for name in NAMES.keys() - {b".", b".."}:
        node = found[name].node
        assert client.ask(3, node, bytes(16)).unpack("QII" + ATTR)[3] == found[name].inode
        client.tell(2, node, struct.pack("=Q", 1))
        if name != b"d":
            assert client.ask(3, node, bytes(16)).error == errno.ESTALE


def test_fallocate(client: Wire, base: Path) -> None:
    u = client.look_up(b"u")
    assert client.ask(43, u, struct.pack("=QQQII", 0, 0, 100, 0, 0)) == Answer(0, b"")
    assert (base / "upper" / "u").stat().st_size == 100


def test_lseek(client: Wire) -> None:
    f = client.look_up(b"f")
    assert client.ask(46, f, struct.pack("=QQII", 0, 2, 3, 0)).unpack("Q") == (2,)
    assert client.ask(46, f, struct.pack("=QQII", 0, 2, 4, 0)).unpack("Q") == (18,)
    assert client.ask(46, f, struct.pack("=QQII", 0, 99, 3, 0)).error == errno.ENXIO


@pytest.mark.parametrize(("opcode", "layout", "answer"), [(47, "II", (9, 0)), (53, "Q", (9,))])
def test_copy_file_range(client: Wire, base: Path, opcode: int, layout: str, answer: tuple[int, ...]) -> None:
    f, u = client.look_up(b"f"), client.look_up(b"u")
    body = struct.pack("=QQQQQQQ", 0, 3, u, 0, 1, 9, 0)
    assert client.ask(opcode, f, body).unpack(layout) == answer
    assert (base / "upper" / "u").read_bytes() == b"othe lowerer layer"


def test_tmpfile(client: Wire, base: Path) -> None:
    answer = client.ask(51, 1, struct.pack("=IIII", 0o20200002, 0o100666, 0o022, 0) + b"#1\0")
    fields = answer.unpack(ENTRY + ATTR + "QIi")
    node = fields[0]
    assert stat.S_IMODE(fields[15]) == 0o644 and fields[16] == 0
    assert client.ask(16, node, struct.pack("=QQIIQII", 0, 0, 4, 0, 0, 0, 0) + b"data").unpack("II") == (4, 0)
    client.ask(13, 1, struct.pack("=Q", node) + b"named\0").unpack(ENTRY + ATTR)
    assert (base / "upper" / "named").read_bytes() == b"data"


def test_an_unknown_ioctl_is_enotty(client: Wire) -> None:
    f = client.look_up(b"f")
    assert client.ask(39, f, struct.pack("=QIIQII", 0, 0, 0x5401, 0, 0, 0)).error == errno.ENOTTY


def test_interrupt_and_a_notification_s_reply_are_not_answered(client: Wire) -> None:
    client.tell(36, 0, struct.pack("=Q", 2))
    client.tell(41, client.look_up(b"f"), bytes(40))


def test_destroy_is_answered_with_nothing(client: Wire) -> None:
    assert client.ask(38, 0) == Answer(0, b"")


# OPEN, FLUSH, the locks, ACCESS, CREATE, BMAP and POLL: the kernel does without them.
@pytest.mark.parametrize("opcode", [14, 25, 31, 32, 33, 34, 35, 37, 40])
def test_what_the_kernel_can_do_itself_is_enosys(client: Wire, opcode: int) -> None:
    assert client.ask(opcode, client.look_up(b"f"), bytes(64)).error == errno.ENOSYS


def test_what_others_than_root_ask_is_refused_with_allow_root(base: Path) -> None:
    with served(base, allow_root=True) as client:
        f = client.look_up(b"f")
        assert client.ask(1, 1, b"f\0", uid=1000).error == errno.EACCES
        assert client.ask(3, f, bytes(16), uid=1000).error == errno.EACCES
        # Whoever has the file open may go on.
        read = struct.pack("=QQIIQII", 0, 0, 2, 0, 0, 0, 0)
        assert client.ask(15, f, read, uid=1000) == Answer(0, b"of")


def test_the_name_that_is_left_of_an_open_file_leads_to_the_file_that_is_open(base: Path) -> None:
    os.link(base / "upper" / "u", base / "upper" / "other")
    with served(base) as client:
        u = client.look_up(b"u")
        # The session has not met the other name, and the object has only that one afterwards.
        assert client.ask(wire.UNLINK, 1, b"u\0").error == 0
        assert client.look_up(b"other") == u


def errors(base: Path, minor: int) -> list[tuple[int, int]]:
    """What each valid request is answered with, and its opcode, where the kernel speaks that minor version."""
    lay_out(base)
    found = []
    with served(base, greet=False) as client:
        # INIT_EXT is of 7.36, SETXATTR_EXT of 7.33.
        flags = 0xFFFFFFFF if minor >= 36 else 0x3FFFFFFF if minor >= 33 else 0x1FFFFFFF
        init = wire.init_body(minor, flags)[: 64 if minor >= 36 else 16]
        assert client.ask(wire.INIT, 0, init).error == 0
        for message in valid(client):
            body = message.body
            if message.opcode in {wire.INIT, wire.DESTROY} | wire.UNANSWERED:
                continue
            if message.opcode == wire.SETXATTR and minor < 33:
                body = body[:8] + body[16:]
            found.append((message.opcode, client.ask(message.opcode, message.node, body).error))
    return found


@pytest.mark.parametrize("minor", range(31, 45))
def test_older_versions_are_answered_as_the_newest(tmp_path: Path, minor: int) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    assert errors(tmp_path / "old", minor) == errors(tmp_path / "new", 45)
