"""Layers full of symbolic links, devices, FIFOs and names that look like marks: nothing outside is touched."""

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.hostile.canary import Canary
from tests.hostile.everything import CHANGING, LOOKING, do, remove_all
from tests.support import trees
from tests.support.mounts import our_mount
from tests.support.trees import Layer, Node

LIMIT = 60  # seconds after which requests count as hanging: the connection is aborted and the test fails


def targets(outside: Path) -> dict[bytes, bytes]:
    """Ways out."""
    return {
        b"absolute": os.fsencode(outside),
        b"relative": b"../outside",
        b"deeper": b"../../outside",
        b"deepest": b"../../../outside",
        b"parent": b"..",
        b"root": b"/",
        b"proc": b"/proc/self/root" + os.fsencode(outside),
        b"cwd": b"/proc/self/cwd",
        b"secret": os.fsencode(outside / "secret"),
        b"loop": b"loop",
        b"empty-ish": b".",
    }


def links(outside: Path, prefix: bytes) -> Layer:
    return tuple(Node(prefix + name, "symlink", data=target) for name, target in targets(outside).items())


def directories(prefix: bytes) -> Layer:
    """Real directories and files where another layer has links."""
    return tuple(
        node
        for name in targets(Path("/"))
        for node in (Node(prefix + name + b"/secret", data=b"inside"), Node(prefix + name + b"/sub/secret"))
    )


def marks(outside: Path, prefix: bytes) -> Layer:
    secret = os.fsencode(outside / "secret")
    return (
        Node(prefix + b".wh."),
        Node(prefix + b".wh..wh."),
        Node(prefix + b".wh..wh.opq"),
        Node(prefix + b".wh.."),
        Node(prefix + b".wh..."),
        Node(prefix + b".wh." + b"n" * 251),
        Node(prefix + b".wh.directory", "dir"),
        Node(prefix + b".wh.absolute", "symlink", data=secret),
        Node(prefix + b".wh.fifo", "fifo"),
        Node(prefix + b".wh.device", "chr", rdev=(0, 0)),
        Node(prefix + b"opaque-link/.wh..wh..opq", "symlink", data=secret),
        Node(prefix + b"opaque-dir/.wh..wh..opq", "dir"),
        Node(prefix + b"opaque-fifo/.wh..wh..opq", "fifo"),
    )


SPECIAL: Layer = (
    Node(b"was-file", "fifo"),
    Node(b"was-file2", "chr", rdev=(1, 8)),
    Node(b"was-file3", "socket"),
    Node(b"was-dir", "fifo"),
    Node(b"disk", "blk", rdev=(7, 250)),
    Node(b"tty", "chr", rdev=(5, 0)),
    Node(b"a/tape", "chr", rdev=(9, 250)),
)
PLAIN: Layer = (
    Node(b"was-file", data=b"f"),
    Node(b"was-file2", data=b"f"),
    Node(b"was-file3", data=b"f"),
    Node(b"was-dir/below", data=b"f"),
    Node(b"a/plain", data=b"f"),
    Node(b"opaque-link/below", data=b"f"),
    Node(b"opaque-dir/below", data=b"f"),
    Node(b"opaque-fifo/below", data=b"f"),
)


def stacks(outside: Path) -> dict[str, tuple[Layer, ...]]:
    """Hostile layers, topmost first."""
    out = tuple(node for prefix in (b"", b"a/b/") for node in links(outside, prefix))
    inside = tuple(node for prefix in (b"", b"a/b/") for node in directories(prefix))
    looks_like = tuple(node for prefix in (b"", b"a/") for node in marks(outside, prefix))
    return {
        "links over directories": (out, inside),
        "directories over links": (inside, out),
        "links over links": (out, out),
        "links between directories": (inside, out, inside),
        "marks": (looks_like, PLAIN, out),
        "special files": (SPECIAL, PLAIN),
        "everything": (looks_like, SPECIAL, out, inside, PLAIN),
    }


@pytest.mark.parametrize("where", ["lower", "upper"])
@pytest.mark.parametrize("name", stacks(Path("/")))
def test_nothing_outside_the_layers_is_touched(layers: Layers, canary: Canary, name: str, where: str) -> None:
    stack = list(stacks(canary.path)[name])
    if where == "upper":
        trees.build(os.fsencode(layers.upper), stack.pop(0))
    lowers = []
    for number, layer in enumerate(stack):
        lowers.append(layers.add(f"lower{number}"))
        trees.build(os.fsencode(lowers[-1]), layer)
    before = [trees.read_tree(os.fsencode(lower), 0) for lower in lowers]
    with our_mount(layers.mnt, lowers, layers.upper, layers.work, limit=LIMIT):
        errors = do(layers.mnt, *LOOKING)
        errors |= do(layers.mnt, *CHANGING)
        errors |= do(layers.mnt, *LOOKING)
        errors |= remove_all(layers.mnt)
        assert os.listdir(layers.work / "work") == []
    assert not errors & {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}
    assert [trees.read_tree(os.fsencode(lower), 0) for lower in lowers] == before


def test_a_link_is_shown_as_it_is(layers: Layers, canary: Canary) -> None:
    trees.build(os.fsencode(layers.lower), links(canary.path, b""))
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work):
        for name, target in targets(canary.path).items():
            assert os.readlink(os.path.join(os.fsencode(layers.mnt), name)) == target
            os.chown(os.path.join(os.fsencode(layers.mnt), name), 5, 5, follow_symlinks=False)
            assert os.readlink(os.path.join(os.fsencode(layers.upper), name)) == target


def test_the_work_directory_is_cleared_without_following_links(layers: Layers, canary: Canary) -> None:
    work = layers.work / "work"
    trees.build(os.fsencode(layers.work), links(canary.path, b"work/"))
    os.symlink(canary.path, work / "#1")
    (work / "deep/er").mkdir(parents=True)
    os.symlink(canary.path, work / "deep/er/link")
    os.mkfifo(work / "deep/fifo")
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work):
        assert os.listdir(work) == []


@pytest.mark.parametrize("name", ["work", "index"])
def test_a_link_in_the_place_of_a_part_of_the_work_directory_is_refused(
    layers: Layers, canary: Canary, name: str
) -> None:
    os.symlink(canary.path, layers.work / name)
    with (
        pytest.raises(AssertionError, match="was not mounted: status"),
        our_mount(layers.mnt, [layers.lower], layers.upper, layers.work),
    ):
        pass


@pytest.mark.parametrize("kind", ["symlink", "dir", "fifo", "file"])
def test_an_entry_of_the_index_that_is_something_else_is_no_copy(layers: Layers, canary: Canary, kind: str) -> None:
    trees.build(os.fsencode(layers.lower), (Node(b"a", data=b"data"), Node(b"b", "link", data=b"a")))
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work):
        os.chmod(layers.mnt / "a", 0o600)
    (entry,) = (layers.work / "index").iterdir()
    entry.unlink()
    (layers.upper / "a").unlink()
    if kind == "symlink":
        entry.symlink_to(canary.path / "secret")
    elif kind == "dir":
        entry.mkdir()
    elif kind == "fifo":
        os.mkfifo(entry)
    else:
        entry.write_bytes(b"forged")
        os.setxattr(entry, "trusted.overlay.nlink", b"L+99999999999")
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, limit=LIMIT):
        assert stat.S_ISREG(os.lstat(layers.mnt / "a").st_mode)
        if kind != "file":
            assert (layers.mnt / "a").read_bytes() == b"data"
        do(layers.mnt, *LOOKING, *CHANGING)
