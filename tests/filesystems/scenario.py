"""One scenario for every combination of filesystems: what is done through a mount, and what has to show."""

import os
from dataclasses import dataclass
from pathlib import Path

from tests.support import trees
from tests.support.trees import Node

LAYER = (
    Node(b"file", data=b"file of a lower layer", mode=0o640, uid=5, gid=6, xattrs=(("user.k", b"v"),)),
    Node(b"gone", data=b"gone"),
    Node(b"dir/x", data=b"x" * 70_000),
    Node(b"dir/sub/y", data=b"y"),
    Node(b"other/z", data=b"z"),
    Node(b"one", data=b"linked"),
    Node(b"two", kind="link", data=b"one"),
    Node(b"dir/three", kind="link", data=b"one"),
    Node(b"sym", kind="symlink", data=b"dir/x"),
    Node(b"fifo", kind="fifo"),
    Node(b"null", kind="chr", rdev=(1, 3)),
)


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells an object from all others."""

    dev: int
    ino: int


def identities(root: Path) -> dict[str, Identity]:
    found = {}
    for folder, directories, files in os.walk(root):
        for name in (*directories, *files):
            st = os.lstat(os.path.join(folder, name))
            found[os.path.relpath(os.path.join(folder, name), root)] = Identity(st.st_dev, st.st_ino)
    return found


def shown(root: Path) -> trees.Tree:
    return trees.read_tree(os.fsencode(root), 0)


def read(root: Path) -> None:
    assert (root / "file").read_bytes() == b"file of a lower layer"
    assert os.getxattr(root / "file", "user.k") == b"v"
    assert (root / "sym").read_bytes() == b"x" * 70_000
    assert sorted(os.listdir(root / "dir")) == ["sub", "three", "x"]
    assert os.lstat(root / "one").st_nlink == 3
    assert len({identity.dev for identity in identities(root).values()}) == 1


def change(root: Path) -> dict[str, str]:
    """Copy up, rename, remove, link, make; where each object that was there has gone."""
    with open(root / "file", "r+b") as file:
        file.write(b"FILE")
    os.chmod(root / "fifo", 0o600)
    os.chown(root / "sym", 7, 8, follow_symlinks=False)
    os.rename(root / "dir", root / "other/moved")
    os.truncate(root / "other/moved/x", 10)
    os.unlink(root / "gone")
    os.mkdir(root / "gone")
    (root / "gone/new").write_bytes(b"new")
    with open(root / "two", "r+b") as file:
        file.write(b"LINKED")
    os.link(root / "other/moved/sub/y", root / "y")
    os.rename(root / "null", root / "gone/null")
    return {
        "file": "file",
        "fifo": "fifo",
        "sym": "sym",
        "dir": "other/moved",
        "dir/x": "other/moved/x",
        "dir/sub": "other/moved/sub",
        "dir/sub/y": "y",
        "other": "other",
        "other/z": "other/z",
        "two": "two",
        "null": "gone/null",
    }


def changed(root: Path, *, linked: bool) -> None:
    """What `change` has made, with hard links kept or broken."""
    assert (root / "file").read_bytes() == b"FILE of a lower layer"
    assert os.getxattr(root / "file", "user.k") == b"v"
    assert os.lstat(root / "file").st_mode & 0o777 == 0o640
    assert os.lstat(root / "sym").st_uid == 7
    assert (root / "other/moved/x").read_bytes() == b"x" * 10
    assert not (root / "dir").exists()
    assert sorted(os.listdir(root / "gone")) == ["new", "null"]
    assert (root / "two").read_bytes() == b"LINKED"
    for name in ("one", "other/moved/three"):
        assert (root / name).read_bytes() == (b"LINKED" if linked else b"linked")
    assert os.path.samefile(root / "one", root / "two") == linked
    assert os.lstat(root / "y").st_nlink == 2
    assert os.path.samefile(root / "y", root / "other/moved/sub/y")
