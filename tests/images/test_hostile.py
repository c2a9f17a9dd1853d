"""Archives that lie: one line says so, nothing is left in the store, nothing is touched outside of it."""

import gzip
import io
import os
import random
import tarfile
from pathlib import Path

import pytest
import zstandard

from overlayfs_py.images import ImageError, Store
from overlayfs_py.images.load import load
from overlayfs_py.images.settle import settle
from overlayfs_py.images.unpack import extract
from tests.images.rig import Item, archive, digest, folder, link, load_one, our_tree, symlink, write_layout
from tests.images.test_unpack import BOTTOM, MIDDLE, TOP

GOOD = archive([folder("./"), Item("file", b"x" * 100_000)])

BAD_LAYERS = {
    "dots": [Item("../canary", b"overwritten")],
    "inner-dots": [folder("a"), Item("a/../../canary", b"overwritten")],
    "through-a-symlink": [symlink("out", ".."), Item("out/canary", b"overwritten")],
    "through-an-absolute-symlink": [symlink("out", "/var/tmp"), Item("out/canary", b"overwritten")],
    "dir-through-a-symlink": [symlink("out", ".."), folder("out/canary-dir")],
    "hard-link-with-dots": [link("in", "../canary")],
    "hard-link-through-a-symlink": [symlink("out", ".."), link("in", "out/canary")],
    "hard-link-to-nothing": [link("in", "not-there")],
    "hard-link-to-itself": [Item("in", b"x"), link("in", "in")],
    "hard-link-to-the-root": [link("in", "./")],
    "hard-link-to-a-directory": [folder("a"), link("in", "a")],
    "below-a-file": [Item("a", b"x"), Item("a/b", b"y")],
    "nul": [Item("a", b"x", pax=(("path", "a\0b"),))],
    "long-name": [Item("n" * 256, b"x")],
    "a-root-that-is-a-file": [Item("./", b"x")],
    "whiteout-device": [Item("gone", kind=tarfile.CHRTYPE)],
    "whiteout-of-no-name": [Item("a/.wh.", b"")],
    "whiteout-of-the-parent": [Item("a/.wh...", b"")],
    "in-a-whiteout": [Item("a/.wh.b/c", b"")],
    "an-owner-that-is-no-id": [Item("a", b"x", uid=2**32)],
    "a-time-that-is-none": [Item("a", b"x", pax=(("mtime", "nan"),))],
    "a-time-without-end": [Item("a", b"x", pax=(("mtime", "1e999999"),))],
    "a-device-that-is-none": [Item("a", kind=tarfile.BLKTYPE, device=(5000, 1))],
    "an-unknown-type": [Item("a", b"x", kind=b"Z")],
}


def refused(store: Store, source: Path) -> str:
    """The message with which an image is refused, when nothing of it is left."""
    with pytest.raises(ImageError) as caught:
        list(load(store, source))
    assert "\n" not in str(caught.value)
    assert store.images() == []
    left = [path.relative_to(store.root) for path in store.root.rglob("*")]
    files = ("lock", "tmp.lock", "oci-layout", "settings.json")
    folders = ("blobs", "blobs/sha256", "layers", "tmp", "partial")
    assert sorted(map(str, left)) == sorted((*files, *folders))
    return str(caught.value)


@pytest.fixture
def canary(base: Path) -> Path:
    """A file that archives point at, beside the store and in every directory on the way to its layers."""
    path = base / "canary"
    path.write_bytes(b"alive")
    return path


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_a_layer_that_leaves_its_directory_or_makes_no_sense_is_refused(
    store: Store, base: Path, canary: Path, name: str
) -> None:
    write_layout(base / "layout", [GOOD, archive(BAD_LAYERS[name])])
    before = sorted(base.parent.iterdir())
    refused(store, base / "layout")
    assert canary.read_bytes() == b"alive"
    assert sorted(base.parent.iterdir()) == before
    assert not Path("/var/tmp/canary").exists()


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
@pytest.mark.parametrize("keep", [10, 100, -1])
def test_a_compressed_layer_that_ends_early_is_refused(store: Store, base: Path, pack: object, keep: int) -> None:
    assert callable(pack)
    write_layout(base / "layout", [pack(GOOD)[:keep]], diff_ids=[digest(GOOD)])
    refused(store, base / "layout")


@pytest.mark.parametrize("keep", [100, 512, 1300, 50_000])
def test_a_layer_that_ends_early_is_refused_though_its_digest_is_right(store: Store, base: Path, keep: int) -> None:
    bad = archive([Item("file", b"x" * 100_000)])[:keep]
    write_layout(base / "layout", [bad])
    refused(store, base / "layout")


def test_a_layer_that_is_not_what_its_diff_id_says_is_refused(store: Store, base: Path) -> None:
    write_layout(base / "layout", [GOOD], diff_ids=[digest(b"something else")])
    assert "not what the image says" in refused(store, base / "layout")


def test_a_blob_that_is_not_what_its_digest_says_is_refused(store: Store, base: Path) -> None:
    write_layout(base / "layout", [GOOD])
    blob = base / "layout" / "blobs" / "sha256" / digest(GOOD).removeprefix("sha256:")
    blob.write_bytes(GOOD[:-1] + b"\1")
    assert "not what its descriptor says" in refused(store, base / "layout")


def test_a_blob_that_is_missing_is_named(store: Store, base: Path) -> None:
    write_layout(base / "layout", [GOOD])
    name = digest(GOOD).removeprefix("sha256:")
    (base / "layout" / "blobs" / "sha256" / name).unlink()
    assert name in refused(store, base / "layout")


def test_a_blob_that_is_a_link_out_of_the_layout_is_not_followed(store: Store, base: Path) -> None:
    write_layout(base / "layout", [GOOD])
    blob = base / "layout" / "blobs" / "sha256" / digest(GOOD).removeprefix("sha256:")
    (base / "outside").write_bytes(GOOD)
    blob.unlink()
    blob.symlink_to(base / "outside")
    refused(store, base / "layout")


@pytest.mark.parametrize("data", [b"", b"no archive", b"\0" * 1024, b"\x1f\x8bjunk", b"\x28\xb5\x2f\xfdjunk"])
def test_a_file_that_is_no_image_is_refused(store: Store, base: Path, data: bytes) -> None:
    (base / "image.tar").write_bytes(data)
    refused(store, base / "image.tar")


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"manifests": [1]}', '{"manifests": [{"digest": "sha256:x"}]}', "[" * 100_000]
)
def test_an_index_that_makes_no_sense_is_refused(store: Store, base: Path, index: str) -> None:
    write_layout(base / "layout", [GOOD])
    (base / "layout" / "index.json").write_text(index)
    refused(store, base / "layout")


def test_a_header_that_claims_to_be_huge_takes_no_memory(store: Store, base: Path) -> None:
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    write_layout(base / "layout", [info.tobuf(tarfile.USTAR_FORMAT if info.size < 8**11 else tarfile.GNU_FORMAT)])
    assert "header" in refused(store, base / "layout")


def test_a_size_below_zero_does_not_go_back_in_the_archive(store: Store, base: Path) -> None:
    info = tarfile.TarInfo("file")
    info.size = -1024
    write_layout(base / "layout", [info.tobuf(tarfile.GNU_FORMAT) * 4])
    refused(store, base / "layout")


def test_marks_in_an_archive_are_only_xattrs_in_the_layer(store: Store, base: Path) -> None:
    planted = (
        ("SCHILY.xattr.trusted.overlay.opaque", "y"),
        ("SCHILY.xattr.trusted.overlay.redirect", "/secret"),
        ("SCHILY.xattr.user.fuseoverlayfs.opaque", "y"),
    )
    bottom = archive([folder("dir"), Item("dir/below", b"x"), folder("secret", mode=0o700)])
    write_layout(base / "layout", [bottom, archive([folder("dir", pax=planted)])])
    image = load_one(store, base / "layout")
    tree = our_tree(image, base / "mnt")
    assert b"dir/below" in tree
    assert dict(tree[b"dir"].xattrs) == {"trusted.overlay.opaque": b"y", "trusted.overlay.redirect": b"/secret"}


def mutated(data: bytes, choice: random.Random) -> bytes:
    """An archive with some bytes, types and blocks changed, and checksums that are right in spite of it."""
    result = bytearray(data)
    for _ in range(choice.randint(1, 6)):
        at = choice.randrange(len(result))
        block = at // 512 * 512
        if choice.random() < 0.6:
            result[at] = choice.choice((0, 0x2F, 0x2E, 0xFF, 0x80, choice.randrange(256)))
        elif choice.random() < 0.5:
            result[block + 156] = choice.choice(b"0123456789xgLKSDMV")
        else:
            result[block:block] = result[choice.randrange(len(result)) // 512 * 512 :][:512]
    for block in range(0, len(result), 512):
        if result[block + 257 : block + 262] == b"ustar":
            result[block + 148 : block + 156] = b" " * 8
            result[block + 148 : block + 156] = b"%06o\0 " % sum(result[block : block + 512])
    return bytes(result)


@pytest.mark.parametrize("seed", range(4))
def test_an_archive_with_random_damage_is_unpacked_or_refused(base: Path, canary: Path, seed: int) -> None:
    choice = random.Random(seed)
    formats = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
    whole = [archive(items, form) for items in (BOTTOM, MIDDLE, TOP) for form in formats]
    lower = base / "lower"
    lower.mkdir()
    settle(lower, extract(io.BytesIO(whole[0]), lower, userxattr=False), [], userxattr=False)
    for serial in range(40):
        target = base / f"target-{serial}"
        target.mkdir()
        try:
            extracted = extract(io.BytesIO(mutated(choice.choice(whole), choice)), target, userxattr=False)
            settle(target, extracted, [lower], userxattr=False)
        except ImageError as error:
            assert "\n" not in str(error)
    targets = {f"target-{serial}" for serial in range(40)}
    assert set(os.listdir(base)) == {"canary", "lower", *targets}
    assert canary.read_bytes() == b"alive"


def test_a_deep_tree_is_unpacked_and_replaced(store: Store, base: Path) -> None:
    deep = "/".join(["d" * 50] * 200)
    write_layout(base / "layout", [archive([Item(f"top/{deep}/file", b"x"), Item("top", b"now a file")])])
    image = load_one(store, base / "layout")
    assert our_tree(image, base / "mnt")[b"top"].kind == "file"
