"""A container's upper layer becomes a layer of an image that everyone reads back to the same tree."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overlayfs_py.images import Image, ImageError, Store
from overlayfs_py.images.changes import Change, changes
from overlayfs_py.images.save import save
from tests.images.rig import Item, archive, folder, link, load_one, our_tree, since, symlink, umoci_tree, write_layout
from tests.support.mounts import kernel_mount, our_mount
from tests.support.trees import Tree, compare_trees, read_tree

LAYERS = [
    [
        folder("./"),
        folder("dir", mode=0o750),
        Item("dir/one", b"1"),
        Item("dir/two", b"2" * 100_000),
        folder("dir/sub"),
        Item("dir/sub/deep", b"deep"),
        Item("file", b"file"),
        Item("chmodded", b"c" * 50_000),
        Item("linked", b"l"),
        link("linked-too", "linked"),
        symlink("symlink", "file"),
        folder("removed"),
        Item("removed/x", b"x"),
        folder("rebuilt"),
        Item("rebuilt/old", b"x"),
        folder("dir-to-file"),
        Item("dir-to-file/x", b"x"),
        Item("file-to-dir", b"x"),
        folder("untouched"),
        *(Item(f"untouched/{serial}", b"u") for serial in range(50)),
    ],
    [Item("dir/from-second", b"2nd"), Item("file", b"file of the second"), Item(".wh.symlink")],
]


def change_everything(root: Path) -> None:
    (root / "dir" / "one").write_text("changed")
    (root / "dir").rename(root / "moved")
    (root / "moved" / "new").write_bytes(b"n")
    (root / "moved" / "sub" / "deep").unlink()
    (root / "chmodded").chmod(0o4711)
    os.setxattr(root / "chmodded", "user.note", b"\x00\xff")
    (root / "linked").write_text("both")
    shutil.rmtree(root / "removed")
    shutil.rmtree(root / "rebuilt")
    (root / "rebuilt").mkdir(mode=0o700)
    (root / "rebuilt" / "new").write_text("n")
    shutil.rmtree(root / "dir-to-file")
    (root / "dir-to-file").write_text("f")
    (root / "file-to-dir").unlink()
    (root / "file-to-dir").mkdir()
    (root / "file-to-dir" / "x").write_text("x")
    os.mkfifo(root / "pipe")
    os.mknod(root / "device", 0o020600, os.makedev(1, 5))
    (root / "first-name").write_text("hard")
    os.link(root / "first-name", root / "second-name")
    os.symlink("nowhere", root / "new-symlink")
    os.chown(root / "new-symlink", 5, 6, follow_symlinks=False)
    (root / "naïve-\udcfe").write_text("bytes")
    os.utime(root / "first-name", ns=(1, 1_234_567_890_123_456_789))


@pytest.fixture
def image(store: Store, base: Path) -> Image:
    write_layout(base / "layout", [archive(items) for items in LAYERS], Cmd=["/bin/true"])
    return load_one(store, base / "layout")


@contextmanager
def container(image: Image, base: Path, name: str = "container", options: str = "") -> Iterator[tuple[Path, Path]]:
    """The root and the upper directory of a container on the kernel's overlayfs, or with options "ours" on ours."""
    paths = [base / f"{name}-{part}" for part in ("upper", "work", "root")]
    for path in paths:
        path.mkdir()
    upper, work, root = paths
    lowers = [layer.path for layer in reversed(image.layers)]
    with (
        our_mount(root, lowers, upper, work) if options == "ours" else kernel_mount(root, lowers, upper, work, options)
    ):
        yield root, upper


def changed(
    image: Image, base: Path, options: str, act: Callable[[Path], None] = change_everything
) -> tuple[Path, Tree]:
    """The upper directory after some changes, and the tree they led to."""
    with container(image, base, options=options) as (root, upper):
        act(root)
        return upper, read_tree(bytes(root), since())


def assert_same(ours: Tree, theirs: Tree) -> None:
    differences = compare_trees(ours, theirs, ignore=("atime", "nlink", "foreign", "sparse"))
    assert not differences, "\n".join(map(str, differences))


@pytest.mark.parametrize("options", ["", "redirect_dir=on,index=on", "redirect_dir=on,metacopy=on,index=on", "ours"])
def test_a_committed_layer_is_the_changed_tree_for_us_and_for_umoci(
    store: Store, base: Path, image: Image, options: str
) -> None:
    def act(root: Path) -> None:
        if options:
            change_everything(root)
        else:
            # A directory of a lower layer can't be renamed without redirects.
            shutil.copytree(root / "dir", root / "moved", symlinks=True)
            shutil.rmtree(root / "dir")
            (root / "moved").rename(root / "dir")
            change_everything(root)

    upper, tree = changed(image, base, options, act)
    made = store.commit(upper, image, name="changed:1", changes={"Cmd": ["/bin/sh"]}, comment="c", author="a")
    assert made.names == ("changed:1",)
    assert made.config["config"] == {"Cmd": ["/bin/sh"]}
    assert made.layers[:-1] == image.layers
    assert_same(our_tree(made, base / "mnt"), tree)
    (base / "saved").mkdir()
    save(store, [(made, "")], base / "saved", form="oci")
    subprocess.run(
        ["skopeo", "copy", "--quiet", f"oci:{base / 'saved'}", f"oci:{base / 'copied'}:latest"], check=True, timeout=60
    )
    assert_same(umoci_tree(base / "copied", base / "bundle"), tree)


def test_the_storage_of_podman_unpacks_a_committed_layer_to_the_same_tree(
    store: Store, base: Path, image: Image
) -> None:
    upper, tree = changed(image, base, "redirect_dir=on,index=on")
    made = store.commit(upper, image, name="changed:1")
    save(store, [(made, "changed:1")], base / "saved.tar", form="docker-archive")
    target = f"containers-storage:[vfs@{base}/podman+{base}/run]localhost/changed:1"
    command = ["skopeo", "copy", "--quiet", f"docker-archive:{base / 'saved.tar'}", target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    kept = json.loads((base / "podman/vfs-layers/layers.json").read_text())
    (top,) = {layer["id"] for layer in kept} - {layer.get("parent") for layer in kept}
    theirs = read_tree(bytes(base / "podman/vfs/dir" / top), since())
    # The time of the root is that of its copying.
    del theirs[b"."], tree[b"."]
    assert_same(theirs, tree)


def test_equal_uppers_give_the_same_layer_to_the_byte(store: Store, base: Path, image: Image) -> None:
    upper, _ = changed(image, base, "redirect_dir=on")
    again = base / "again"
    subprocess.run(["cp", "-a", upper, again], check=True)
    first = store.commit(upper, image)
    second = store.commit(again, image)
    assert first.layers[-1] == second.layers[-1]


def test_changes_are_those_docker_would_tell(base: Path, image: Image) -> None:
    upper, _ = changed(image, base, "redirect_dir=on")
    lowers = [layer.path for layer in reversed(image.layers)]
    found = {change.path.decode(errors="surrogateescape"): change.kind for change in changes(upper, lowers)}
    assert found == {
        "chmodded": "C",
        "device": "A",
        "dir": "D",
        "dir-to-file": "C",
        "file-to-dir": "C",
        "file-to-dir/x": "A",
        "first-name": "A",
        "linked": "C",
        "moved": "A",
        "moved/from-second": "A",
        "moved/new": "A",
        "moved/one": "A",
        "moved/sub": "A",
        "moved/two": "A",
        "naïve-\udcfe": "A",
        "new-symlink": "A",
        "pipe": "A",
        "rebuilt": "C",
        "rebuilt/new": "A",
        "rebuilt/old": "D",
        "removed": "D",
        "second-name": "A",
    }


def test_nothing_changed_is_no_change(base: Path, image: Image) -> None:
    with container(image, base) as (_, upper):
        lowers = [layer.path for layer in reversed(image.layers)]
        assert list(changes(upper, lowers)) == []


def test_changes_come_parents_first_and_sorted(base: Path, image: Image) -> None:
    upper, _ = changed(image, base, "redirect_dir=on")
    found = [change.path.split(b"/") for change in changes(upper, [layer.path for layer in reversed(image.layers)])]
    assert found == sorted(found)


def test_a_diff_reads_what_changed_not_the_image(base: Path, image: Image) -> None:
    with container(image, base) as (root, upper):
        (root / "file").write_text("changed")
        lowers = [layer.path for layer in reversed(image.layers)]
        # Were the lower directory looked at, its access time would say so.
        untouched = image.layers[0].path / "untouched"
        os.utime(untouched, ns=(1, 1))
        assert list(changes(upper, lowers)) == [Change("C", b"file")]
        assert untouched.stat().st_atime_ns == 1


def test_a_socket_is_left_out_and_what_it_hides_stays_hidden(store: Store, base: Path, image: Image) -> None:
    def act(root: Path) -> None:
        (root / "file").unlink()
        os.mknod(root / "file", 0o140600)
        os.mknod(root / "new-socket", 0o140600)

    upper, _ = changed(image, base, "", act)
    tree = our_tree(store.commit(upper, image), base / "mnt")
    assert b"file" not in tree and b"new-socket" not in tree and b"dir/one" in tree


def test_a_file_that_would_be_taken_for_a_whiteout_is_refused(store: Store, base: Path, image: Image) -> None:
    before = store.images()
    with container(image, base) as (root, upper):
        (root / "dir" / ".wh.x").write_text("")
        # As mounts of ours mark it, which take it for a file like others.
        os.setxattr(upper / "dir" / ".wh.x", "trusted.overlay.literal", b"y")
    with pytest.raises(ImageError, match=r"dir/\.wh\.x can't be in a layer"):
        store.commit(upper, image)
    assert store.images() == before
