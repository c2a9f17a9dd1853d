"""An image unpacked by us and mounted by the kernel is what umoci unpacks, entry for entry."""

import gzip
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard

from overlayfs_py.images import Store
from overlayfs_py.images.load import load
from tests.images.rig import (
    EPOCH,
    Item,
    archive,
    digest,
    folder,
    link,
    load_one,
    our_tree,
    symlink,
    umoci_tree,
    write_layout,
)
from tests.support.mounts import REPOSITORY
from tests.support.trees import Tree, compare_trees

# A file capability as the kernel stores it: version 2, effective, CAP_NET_BIND_SERVICE.
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0).decode("latin-1")

BOTTOM = [
    folder("./"),
    folder("./etc", mode=0o711, uid=3, gid=4),
    Item("./etc/passwd", b"root:x:0:0\n", pax=(("mtime", "1500000000.123456789"),)),
    Item("./etc/shadow", b"secret\n", mode=0o600, gid=42),
    folder("./bin"),
    Item("./bin/su", b"\x7fELF", mode=0o4755),
    link("./bin/also-su", "./bin/su"),
    Item("./bin/ping", b"ping", pax=(("SCHILY.xattr.security.capability", CAPABILITY),)),
    symlink("./bin/sh", "/bin/su"),
    symlink("./dangling", "no/where"),
    folder("./dev"),
    Item("./dev/null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
    Item("./dev/loop", kind=tarfile.BLKTYPE, device=(7, 1), mode=0o660, gid=6),
    Item("./dev/pipe", kind=tarfile.FIFOTYPE, mode=0o640),
    folder("./tmp", mode=0o1777),
    folder("./opaque"),
    Item("./opaque/below", b"hidden"),
    folder("./opaque/deep"),
    Item("./opaque/deep/below", b"hidden"),
    folder("./gone"),
    folder("./gone/with"),
    Item("./gone/with/all", b"of it"),
    Item("./removed", b"removed"),
    folder("./becomes-file"),
    Item("./becomes-file/inner", b"x"),
    Item("./becomes-dir", b"x"),
    folder("./kept", mode=0o2750, uid=7, pax=(("SCHILY.xattr.user.colour", "blue"), ("mtime", "1400000000.5"))),
    Item("./kept/old", b"old"),
    folder("./rebuilt"),
    Item("./rebuilt/old", b"old"),
    Item("./empty"),
    Item(f"./{'long-' * 30}/{'name-' * 40}", b"long"),
    Item("./naïve-\udcff", b"bytes"),
    Item("./negative", b"x", pax=(("mtime", "-1.25"),)),
]
MIDDLE = [
    # No entries for etc and kept: they are as they were.
    Item("etc/hostname", b"box\n"),
    Item("etc/.wh.shadow"),
    Item("kept/new", b"new"),
    Item(".wh.removed"),
    Item(".wh.gone"),
    folder("opaque", mode=0o700),
    Item("opaque/above", b"shown"),
    Item("opaque/.wh..wh..opq"),
    Item("becomes-file", b"file"),
    folder("becomes-dir"),
    Item("becomes-dir/inner", b"y"),
    # The whiteout is of what is below, wherever it stands.
    folder("rebuilt"),
    Item("rebuilt/new", b"new"),
    Item(".wh.rebuilt"),
    Item("bin/su", b"\x7fELF2", mode=0o4711, mtime=EPOCH + 5),
]
TOP = [
    Item("removed", b"back again"),
    folder("gone"),
    Item("gone/new", b"new"),
    Item("opaque/deep/again", b"implied directory, above an opaque one"),
    Item("etc/.wh.hostname"),
    Item(".wh.nothing-there"),
    Item("becomes-dir/.wh.inner"),
    Item("data", b"twice", mode=0o600),
    Item("data", b"the last one counts", mode=0o640),
    folder("replaced"),
    Item("replaced/inner", b"x"),
    symlink("replaced", "etc"),
]

DEBIAN_CHANGES = [
    Item("usr/share/.wh.doc"),
    Item("etc/.wh.apt"),
    Item("etc/apt/only.list", b"deb"),
    Item("etc/hostname", b"box\n"),
]

DEBIAN_SIZE = 60 << 20
"""Bytes of the Debian root that are unpacked, as umoci would take too long for all of it."""

# Made without an entry: the time is that of the moment with umoci, none with us.
UNNAMED = frozenset((b"opaque/deep", b"long-" * 30))
# umoci removes something in these when their time is set already; with us it is the archive's.
TOUCHED = frozenset((b".", b"opaque", b"rebuilt"))


def assert_equal(ours: Tree, theirs: Tree, untimed: frozenset[bytes]) -> None:
    # Directories' link counts are the overlay's own, hard links are told by `group`.
    differences = compare_trees(ours, theirs, ignore=("atime", "nlink", "foreign", "sparse"))
    differences = [found for found in differences if found.field != "mtime" or found.path not in untimed]
    assert not differences, "\n".join(map(str, differences))


@pytest.mark.parametrize("compress", ["plain", "gzip", "zstd"])
def test_an_image_of_three_layers_is_what_umoci_unpacks(store: Store, base: Path, compress: str) -> None:
    plain = [archive(items) for items in (BOTTOM, MIDDLE, TOP)]
    write_layout(base / "plain", plain)
    if compress == "plain":
        image = load_one(store, base / "plain")
    else:
        pack = gzip.compress if compress == "gzip" else zstandard.compress
        write_layout(base / "packed", [pack(layer) for layer in plain], diff_ids=[digest(layer) for layer in plain])
        image = load_one(store, base / "packed")
    ours = our_tree(image, base / "mnt")
    assert_equal(ours, umoci_tree(base / "plain", base / "bundle"), UNNAMED | TOUCHED)
    assert b"opaque/below" not in ours and b"opaque/deep/below" not in ours and b"rebuilt/old" not in ours
    assert ours[b"opaque"].mtime == EPOCH * 10**9
    assert ours[b"kept"].mtime == 1_400_000_000_500_000_000


def debian_root() -> bytes:
    """The first entries of the archive of a Debian root."""
    done = subprocess.run([REPOSITORY / "tools" / "debian-tree"], capture_output=True, text=True, check=True)
    end = 0
    with open(done.stdout.strip(), "rb") as file, tarfile.open(fileobj=file) as tar:
        while end < DEBIAN_SIZE and tar.next() is not None:
            end = tar.offset
        file.seek(0)
        return file.read(end) + bytes(1024)


def test_a_debian_root_in_two_layers_is_what_umoci_unpacks(store: Store, base: Path) -> None:
    write_layout(base / "layout", [debian_root(), archive(DEBIAN_CHANGES)])
    image = load_one(store, base / "layout")
    assert_equal(
        our_tree(image, base / "mnt"),
        umoci_tree(base / "layout", base / "bundle"),
        frozenset((b"usr/share", b"etc", b"etc/apt")),
    )


def test_a_directory_without_an_entry_over_a_link_is_told(store: Store, base: Path) -> None:
    layers = [archive([folder("usr/lib"), symlink("lib", "usr/lib")]), archive([Item("lib/x", b"x")])]
    write_layout(base / "layout", layers)
    ((image, warnings),) = load(store, base / "layout")
    assert warnings == ["lib is no directory in the layers below, and becomes one, as with Docker"]
    assert our_tree(image, base / "mnt")[b"lib"].kind == "dir"


def test_names_of_aufs_itself_are_left_out(store: Store, base: Path) -> None:
    write_layout(base / "layout", [archive([Item(".wh..wh.plnk/1.2"), Item(".wh..wh.aufs"), Item("a")])])
    assert set(our_tree(load_one(store, base / "layout"), base / "mnt")) == {b".", b"a"}
