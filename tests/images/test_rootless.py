"""The store of a user without privilege, who is root of a user namespace only."""

import os
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from overlayfs_py.images import ImageError, Store
from overlayfs_py.images.changes import Change, changes
from overlayfs_py.images.load import load
from tests.images.rig import archive, since, umoci_tree, write_layout
from tests.images.test_unpack import BOTTOM, MIDDLE, TOP, TOUCHED, UNNAMED, assert_equal
from tests.support.mounts import kernel_mount
from tests.support.namespaces import in_user_namespace
from tests.support.trees import Tree, read_tree


def load_and_look(base: Path) -> tuple[Tree, list[str], bool]:
    """What the kernel shows of an image that is loaded here, and the warnings."""
    store = Store.open(base / "store")
    ((image, warnings),) = load(store, base / "layout")
    for path in (base / "mnt", base / "empty"):
        path.mkdir()
    lowers = [*(layer.path for layer in reversed(image.layers)), base / "empty"]
    with kernel_mount(base / "mnt", lowers, None, None, "userxattr"):
        return read_tree(bytes(base / "mnt"), since()), warnings, store.userxattr


def test_an_image_is_what_umoci_unpacks_but_for_devices(base: Path) -> None:
    write_layout(base / "layout", [archive(items) for items in (BOTTOM, MIDDLE, TOP)])
    ours, warnings, userxattr = in_user_namespace(lambda: load_and_look(base), 60)
    assert userxattr and warnings == ["2 devices left out, which only root can make"]
    theirs = umoci_tree(base / "layout", base / "bundle")
    for device in (b"dev/null", b"dev/loop"):
        assert device not in ours
        del theirs[device]
    # A capability set in a user namespace is one of that namespace: its root is in it (capabilities(7), version 3).
    ping = ours[b"bin/ping"]
    assert [name for name, _ in ping.xattrs] == ["security.capability"]
    ours[b"bin/ping"] = replace(ping, xattrs=theirs[b"bin/ping"].xattrs)
    assert_equal(ours, theirs, UNNAMED | TOUCHED)


def test_a_layer_is_committed_in_a_user_namespace(base: Path) -> None:
    write_layout(base / "layout", [archive(items) for items in (BOTTOM, MIDDLE)])

    def work() -> tuple[list[Change], set[bytes], set[bytes]]:
        store = Store.open(base / "store")
        ((image, _),) = load(store, base / "layout")
        upper, scratch, root = (base / name for name in ("upper", "work", "mnt"))
        for path in (upper, scratch, root):
            path.mkdir()
        lowers = [layer.path for layer in reversed(image.layers)]
        with kernel_mount(root, lowers, upper, scratch, "userxattr"):
            (root / "etc" / "passwd").unlink()
            (root / "kept" / "old").unlink()
            (root / "kept" / "new").unlink()
            (root / "kept").rmdir()
            (root / "kept").mkdir()
            before = set(read_tree(bytes(root), since()))
        found = list(changes(upper, lowers, userxattr=True))
        made = store.commit(upper, image)
        with kernel_mount(root, [layer.path for layer in reversed(made.layers)], None, None, "userxattr"):
            return found, before, set(read_tree(bytes(root), since()))

    found, before, after = in_user_namespace(work, 60)
    assert before == after
    assert found == [
        Change("C", b"etc"),
        Change("D", b"etc/passwd"),
        Change("C", b"kept"),
        Change("D", b"kept/new"),
        Change("D", b"kept/old"),
    ]


def test_a_whiteout_is_an_xattr_where_no_device_can_be_made(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "not here")

    write_layout(base / "layout", [archive(BOTTOM[:4]), archive(MIDDLE[1:2])])
    monkeypatch.setattr(os, "mknod", refuse)
    tree, _, _ = in_user_namespace(lambda: load_and_look(base), 60)
    assert b"etc/passwd" in tree and b"etc/shadow" not in tree
    devices = [path for path in (base / "store").rglob("*") if stat.S_ISCHR(path.lstat().st_mode)]
    assert devices == []


def test_roots_store_is_not_another_users(base: Path) -> None:
    Store.open(base / "store")

    def work() -> str:
        try:
            Store.open(base / "store")
        except ImageError as error:
            return str(error)
        return ""

    assert re.search("is root's store", in_user_namespace(work, 30))


def test_an_owner_outside_the_namespace_is_one_line(base: Path) -> None:
    write_layout(base / "layout", [archive([replace(BOTTOM[1], uid=100_000)])])

    def work() -> str:
        try:
            list(load(Store.open(base / "store"), base / "layout"))
        except ImageError as error:
            return str(error)
        return ""

    assert "etc" in in_user_namespace(work, 30)
