"""What is tried while system calls fail: each change on each kind of object."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from overlayfs_py.sys.rename import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from tests.core.rig import ALICE, Rig
from tests.support import trees
from tests.support.trees import Node

Step = Callable[[Rig], object]

TOP: Final = (
    Node(b"dir/h", data=b"dir/h of the upper lower layer"),
    Node(b"veiled", kind="whiteout"),
)
BOTTOM: Final = (
    Node(b"file", data=b"file of a lower layer", mode=0o640, uid=5, gid=6, xattrs=(("user.k", b"v"),)),
    Node(b"other", data=b"other"),
    Node(b"big", data=b"0123456789abcdef" * 4500, size=200_000),
    Node(b"one", data=b"two names"),
    Node(b"two", kind="link", data=b"one"),
    Node(b"sym", kind="symlink", data=b"file"),
    Node(b"fifo", kind="fifo"),
    Node(b"null", kind="chr", rdev=(1, 3)),
    Node(b"dir/f", data=b"dir/f"),
    Node(b"dir/sub/x", data=b"dir/sub/x"),
    Node(b"deep/a/f", data=b"deep"),
    Node(b"empty", kind="dir"),
    Node(b"full/a", data=b"a"),
    Node(b"gone", data=b"whited out"),
    Node(b"veiled", data=b"never seen"),
)


def build_lowers(base: Path) -> list[Path]:
    """The lower layers that every case uses, topmost first."""
    made = []
    for name, layer in (("top", TOP), ("bottom", BOTTOM)):
        (base / name).mkdir()
        trees.build(os.fsencode(base / name), layer)
        made.append(base / name)
    return made


@dataclass(frozen=True)
class Case:
    """`act` is the one change under test, on what `setup` has left."""

    name: str
    act: Step
    setup: Step = lambda rig: None
    options: dict[str, Any] = field(default_factory=dict)
    whiteouts: Literal["device", "xattr"] = "device"
    tmpfiles: bool = True
    rename_whiteout: bool = True

    def __str__(self) -> str:
        return self.name


def _upper(rig: Rig) -> None:
    """Things of the upper layer alone, and whiteouts."""
    rig.create(b"new", b"new")
    rig.create(b"new2", b"new2")
    rig.mkdir(b"newdir")
    rig.create(b"newdir/n", b"n")
    rig.mkdir(b"newempty")
    rig.unlink(b"gone")
    rig.link(b"new", b"newlink")


def _copied(rig: Rig) -> None:
    """Things of a lower layer that have their copies already."""
    for path in (b"file", b"other", b"one", b"dir/f"):
        rig.write(path, b"X")
    rig.unlink(b"full/a")
    rig.unlink(b"gone")


def _metacopies(rig: Rig) -> None:
    for path in (b"file", b"other", b"one", b"dir/f"):
        rig.change(path, mode=0o600)


def _in_a_row(rig: Rig) -> None:
    """One file after the other has been copied up, so that those behind `file` are copied along with it."""
    for name in (b"file", b"other", b"one", b"null", b"big"):
        rig.node(name)
    rig.fs.unshared.update(rig.fs.layers)
    rig.fs.drafts._hits = 8


def _copy_along(rig: Rig) -> None:
    _in_a_row(rig)
    rig.change(b"file", uid=77)


def _take_draft(rig: Rig) -> None:
    """A copy whose data has been copied along with another one's."""
    _in_a_row(rig)
    first = rig.node(b"file")
    rig.fs.drafts._find(first)
    batch = rig.fs.drafts.begin(first, first.lowers[0])
    if batch is not None:
        done = False
        try:
            with contextlib.closing(rig.fs.writable().stage_file(0o600)) as staged:
                batch.run(staged.fd)
            done = True
        finally:
            rig.fs.drafts.end(batch, done=done)
    rig.change(b"other", uid=77)


def _linked_in_upper(rig: Rig) -> None:
    rig.write(b"one", b"X")
    rig.write(b"two", b"Y")
    rig.link(b"one", b"three")


def _renamed_dir(rig: Rig) -> None:
    rig.rename(b"dir", b"dir2")


def _each(name: str, act: Callable[[Rig, bytes], object], paths: bytes) -> list[Case]:
    """One case for each of the paths."""
    return [Case(f"{name} {path.decode()}", partial(_on, act, path)) for path in paths.split()]


def _on(act: Callable[[Rig, bytes], object], path: bytes, rig: Rig) -> None:
    act(rig, path)


def _tmpfile(rig: Rig) -> None:
    """A file made without a name that is given one."""
    node = rig.call("tmpfile", ALICE, rig.node(b"dir"), 0o640)
    node.lookups = 1
    try:
        rig.call("link", node, rig.node(b"dir"), b"made")
    finally:
        if node.removed:
            rig.forget(node)


_META: Final = {"metacopy": True}

COPY_UPS: Final = (
    Case("write file", lambda rig: rig.open(b"file", os.O_RDWR)),
    Case("write big", lambda rig: rig.open(b"big", os.O_RDWR)),
    Case("write nested", lambda rig: rig.open(b"deep/a/f", os.O_WRONLY)),
    Case("write merged", lambda rig: rig.open(b"dir/sub/x", os.O_WRONLY)),
    Case("write linked", lambda rig: rig.open(b"one", os.O_WRONLY)),
    Case("write linked, no index", lambda rig: rig.open(b"one", os.O_WRONLY), options={"index": False}),
    Case("write file, volatile", lambda rig: rig.open(b"file", os.O_RDWR), options={"volatile": True}),
    Case("write metacopy", lambda rig: rig.open(b"file", os.O_WRONLY), _metacopies, _META),
    Case("write linked metacopy", lambda rig: rig.open(b"one", os.O_WRONLY), _metacopies, _META),
    Case("copy others along", _copy_along),
    Case("take what was copied along", _take_draft),
    Case("write override", lambda rig: rig.open(b"file", os.O_WRONLY), options={"xattr_permissions": 2}),
)
ATTRIBUTES: Final = (
    *_each(
        "chmod",
        lambda rig, path: rig.change(path, mode=0o711),
        b"file one fifo null empty dir deep/a deep/a/f",
    ),
    *_each("chown", lambda rig, path: rig.change(path, uid=77, gid=78), b"file sym two null dir/sub"),
    Case("chmod metacopy made", lambda rig: rig.change(b"file", mode=0o600), options=_META),
    Case("chmod linked metacopy made", lambda rig: rig.change(b"one", mode=0o600), options=_META),
    Case("chmod metacopy", lambda rig: rig.change(b"file", mode=0o644), _metacopies, _META),
    Case("chown override", lambda rig: rig.change(b"file", uid=77), options={"xattr_permissions": 2}),
    Case("truncate to nothing", lambda rig: rig.change(b"file", size=0)),
    Case("truncate shorter", lambda rig: rig.change(b"big", size=100_000)),
    Case("truncate longer", lambda rig: rig.change(b"file", size=5000)),
    Case("truncate linked", lambda rig: rig.change(b"one", size=3)),
    Case("truncate metacopy", lambda rig: rig.change(b"file", size=3), _metacopies, _META),
    Case("truncate copy", lambda rig: rig.change(b"file", size=3), _copied),
    Case("open truncating", lambda rig: rig.open(b"file", os.O_WRONLY | os.O_TRUNC)),
    Case("allocate", lambda rig: rig.call("fallocate", rig.node(b"file"), 0, 0, 5000)),
    Case("punch", lambda rig: rig.call("fallocate", rig.node(b"big"), 3, 4096, 8192)),
    Case("allocate metacopy", lambda rig: rig.call("fallocate", rig.node(b"file"), 0, 0, 5000), _metacopies, _META),
    Case("utimens", lambda rig: rig.change(b"file", atime_ns=1, mtime_ns=2)),
    Case("utimens dir", lambda rig: rig.change(b"dir", atime_ns=1, mtime_ns=2)),
    Case("setxattr file", lambda rig: rig.setxattr(b"file", b"user.a", b"b")),
    Case("setxattr linked", lambda rig: rig.setxattr(b"one", b"user.a", b"b")),
    Case("setxattr dir", lambda rig: rig.setxattr(b"dir", b"user.a", b"b")),
    Case("removexattr", lambda rig: rig.removexattr(b"file", b"user.k")),
)
CREATION: Final = (
    Case("create", lambda rig: rig.call("create", ALICE, *rig.place(b"new"), 0o644)),
    Case("create as root", lambda rig: rig.create(b"new")),
    Case("create nested", lambda rig: rig.create(b"deep/a/new")),
    Case("create over whiteout", lambda rig: rig.create(b"gone"), _upper),
    Case("create dot name", lambda rig: rig.create(b".wh.new")),
    Case("create override", lambda rig: rig.create(b"new"), options={"xattr_permissions": 2}),
    Case("tmpfile linked", _tmpfile),
    Case("mkdir", lambda rig: rig.mkdir(b"made", caller=ALICE)),
    Case("mkdir as root in upper dir", lambda rig: rig.mkdir(b"newdir/made"), _upper),
    Case("mkdir nested", lambda rig: rig.mkdir(b"deep/a/made")),
    Case("mkdir over whiteout", lambda rig: rig.mkdir(b"gone"), _upper),
    Case("mknod", lambda rig: rig.mknod(b"made", stat.S_IFIFO | 0o600, caller=ALICE)),
    Case("mknod as root", lambda rig: rig.mknod(b"made", stat.S_IFCHR | 0o600, os.makedev(1, 5))),
    Case("mknod over whiteout", lambda rig: rig.mknod(b"gone", stat.S_IFIFO | 0o600), _upper),
    Case("symlink", lambda rig: rig.symlink(b"there", b"made", caller=ALICE)),
    Case("symlink as root", lambda rig: rig.symlink(b"there", b"made")),
    Case("symlink over whiteout", lambda rig: rig.symlink(b"there", b"gone"), _upper),
    Case("link lower", lambda rig: rig.link(b"file", b"made")),
    Case("link lower, no index", lambda rig: rig.link(b"file", b"made"), options={"index": False}),
    Case("link linked", lambda rig: rig.link(b"one", b"deep/made")),
    Case("link linked again", lambda rig: rig.link(b"one", b"made"), _linked_in_upper),
    Case("link upper", lambda rig: rig.link(b"new", b"made"), _upper),
    Case("link over whiteout", lambda rig: rig.link(b"new", b"gone"), _upper),
    Case("link metacopy", lambda rig: rig.link(b"file", b"dir/made"), _metacopies, _META),
    Case("link to dot name", lambda rig: rig.link(b"new", b".wh.x"), _upper),
    Case("link symlink", lambda rig: rig.link(b"sym", b"made")),
)
REMOVAL: Final = (
    *_each("unlink", Rig.unlink, b"file one sym fifo dir/h deep/a/f"),
    Case("unlink upper", lambda rig: rig.unlink(b"new2"), _upper),
    Case("unlink upper linked", lambda rig: rig.unlink(b"new"), _upper),
    Case("unlink copy", lambda rig: rig.unlink(b"file"), _copied),
    Case("unlink linked copy", lambda rig: rig.unlink(b"one"), _copied),
    Case("unlink linked other", lambda rig: rig.unlink(b"two"), _copied),
    Case("unlink last link", lambda rig: rig.unlink(b"two"), lambda rig: rig.unlink(b"one")),
    Case("unlink link of upper", lambda rig: rig.unlink(b"three"), _linked_in_upper),
    Case("unlink metacopy", lambda rig: rig.unlink(b"file"), _metacopies, _META),
    Case("rmdir lower", lambda rig: rig.rmdir(b"empty")),
    Case("rmdir upper", lambda rig: rig.rmdir(b"newempty"), _upper),
    Case("rmdir with whiteouts", lambda rig: rig.rmdir(b"full"), _copied),
)
RENAMES: Final = (
    Case("rename file", lambda rig: rig.rename(b"file", b"made")),
    Case("rename into dir", lambda rig: rig.rename(b"file", b"dir/sub/made")),
    Case("rename out of dir", lambda rig: rig.rename(b"dir/sub/x", b"made")),
    Case("rename linked", lambda rig: rig.rename(b"one", b"made")),
    Case("rename linked copy", lambda rig: rig.rename(b"two", b"dir/made"), _copied),
    Case("rename over lower", lambda rig: rig.rename(b"file", b"other")),
    Case("rename over copy", lambda rig: rig.rename(b"file", b"other"), _copied),
    Case("rename over linked", lambda rig: rig.rename(b"file", b"one")),
    Case("rename linked over file", lambda rig: rig.rename(b"two", b"file"), _copied),
    Case("rename upper", lambda rig: rig.rename(b"new", b"made"), _upper),
    Case("rename upper over upper", lambda rig: rig.rename(b"new", b"new2"), _upper),
    Case("rename upper over lower", lambda rig: rig.rename(b"new", b"file"), _upper),
    Case("rename over whiteout", lambda rig: rig.rename(b"file", b"gone"), _upper),
    Case("rename to dot name", lambda rig: rig.rename(b"new", b".wh.x"), _upper),
    Case("rename symlink", lambda rig: rig.rename(b"sym", b"dir/made")),
    Case("rename fifo", lambda rig: rig.rename(b"fifo", b"made")),
    Case("rename merged dir", lambda rig: rig.rename(b"dir", b"made")),
    Case("rename merged dir away", lambda rig: rig.rename(b"dir", b"deep/made")),
    Case("rename nested dir", lambda rig: rig.rename(b"dir/sub", b"made")),
    Case("rename renamed dir", lambda rig: rig.rename(b"dir2", b"deep/a/made"), _renamed_dir),
    Case("rename renamed dir back", lambda rig: rig.rename(b"dir2", b"dir"), _renamed_dir),
    Case("rename in renamed dir", lambda rig: rig.rename(b"dir2/sub", b"dir2/made"), _renamed_dir),
    Case("rename dir over lower empty", lambda rig: rig.rename(b"dir", b"empty")),
    Case("rename dir over whiteouts", lambda rig: rig.rename(b"dir", b"full"), _copied),
    Case("rename dir over whiteout", lambda rig: rig.rename(b"dir", b"gone"), _upper),
    Case("rename upper dir", lambda rig: rig.rename(b"newdir", b"made"), _upper),
    Case("rename upper dir away", lambda rig: rig.rename(b"newdir", b"dir/made"), _upper),
    Case("rename upper dir over upper", lambda rig: rig.rename(b"newdir", b"newempty"), _upper),
    Case("rename upper dir over whiteout", lambda rig: rig.rename(b"newdir", b"gone"), _upper),
    Case("rename metacopy", lambda rig: rig.rename(b"file", b"made"), _metacopies, _META),
    Case("rename metacopy away", lambda rig: rig.rename(b"dir/f", b"deep/made"), _metacopies, _META),
    Case("rename makes metacopy", lambda rig: rig.rename(b"file", b"made"), options=_META),
    Case("rename noreplace", lambda rig: rig.rename(b"file", b"made", RENAME_NOREPLACE)),
    Case("rename noreplace over whiteout", lambda rig: rig.rename(b"file", b"gone", RENAME_NOREPLACE), _upper),
    Case("rename leaving whiteout", lambda rig: rig.rename(b"new", b"made", RENAME_WHITEOUT), _upper),
    Case("exchange files", lambda rig: rig.rename(b"file", b"other", RENAME_EXCHANGE)),
    Case("exchange file and dir", lambda rig: rig.rename(b"file", b"dir", RENAME_EXCHANGE)),
    Case("exchange dirs", lambda rig: rig.rename(b"dir", b"deep/a", RENAME_EXCHANGE)),
    Case("exchange upper and lower", lambda rig: rig.rename(b"newdir", b"dir/sub", RENAME_EXCHANGE), _upper),
    Case("exchange linked", lambda rig: rig.rename(b"one", b"dir/f", RENAME_EXCHANGE)),
)

CASES: Final = COPY_UPS + ATTRIBUTES + CREATION + REMOVAL + RENAMES


def _lesser(label: str, cases: Iterable[Case], **fields: Any) -> list[Case]:
    return [replace(case, name=f"{case.name}, {label}", **fields) for case in cases]


_OVER_DIRECTORY: Final = ("rename dir over lower empty", "rename dir over whiteouts")
_STAGED: Final = [case for case in CREATION if case.name.startswith(("create", "mknod")) and "root" not in case.name]
_OVER_WHITEOUT: Final = [case for case in CREATION if "whiteout" in case.name]
_LEAVING_WHITEOUT: Final = [
    case
    for case in RENAMES
    if case.name not in _OVER_DIRECTORY and not any(word in case.name for word in ("upper", "exchange", "metacopy"))
]
# What differs with the kind of whiteout has been tried with the other kind.
_FEW: Final = [
    case
    for case in RENAMES
    if case.name in ("rename file", "rename over copy", "rename merged dir", "rename dir over whiteout")
]
_XATTR: Final = (*_OVER_WHITEOUT, *REMOVAL, *_LEAVING_WHITEOUT)

LESSER_CASES: Final = (
    *_lesser("without O_TMPFILE", (*COPY_UPS, *_STAGED), tmpfiles=False),
    *_lesser("without RENAME_WHITEOUT", _FEW, rename_whiteout=False),
    *_lesser("xattr whiteouts", _XATTR, rename_whiteout=False, whiteouts="xattr"),
)
"""The same on filesystems that can do less."""
_TWO_STEPS: Final = [case for case in RENAMES if case.name in _OVER_DIRECTORY]
REFUSED_CASES: Final = tuple(_lesser("without RENAME_WHITEOUT", _TWO_STEPS, rename_whiteout=False))
"""What takes two steps there and is refused: EXDEV."""
