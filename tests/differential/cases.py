"""Scripts that once showed a difference."""

import os
from typing import Final

from tests.differential.script import (
    Chmod,
    HandleWrite,
    Link,
    MapWrite,
    Mkdir,
    Open,
    Read,
    Readdir,
    Remount,
    RemoveXattr,
    Rename,
    Rotate,
    Script,
    Stat,
    Step,
    Truncate,
    Unlink,
    Write,
)
from tests.support.syscalls import RENAME_EXCHANGE
from tests.support.trees import ACL_ACCESS, Node

CASES: Final = {
    "removing an ACL that is not there succeeds": Script(
        "privileged",
        ((Node(b"f", data=b"f"),),),
        (
            Step(RemoveXattr(b"f", ACL_ACCESS)),
            Step(Chmod(b"f", 0o600)),
            Step(RemoveXattr(b"f", ACL_ACCESS)),
            Step(RemoveXattr(b"f", "user.a")),
        ),
    ),
    "xattr whiteouts hide in every directory marked opaque=x": Script(
        "privileged",
        (
            (
                Node(b"d", "dir", xattrs=(("@opaque", b"x"),)),
                Node(b"d/gone", xattrs=(("@whiteout", b"y"),)),
                Node(b"d/kept"),
            ),
            (Node(b"d/gone", data=b"gone"), Node(b"d/below")),
        ),
        (
            Step(Readdir(b"d")),
            Step(Unlink(b"d/gone")),
            Step(Unlink(b"d/kept")),
            Step(Unlink(b"d/below")),
            Step(Readdir(b"d")),
        ),
    ),
    "a directory that cannot be moved is not asked whether its target is empty": Script(
        "userxattr",
        ((Node(b"a/b"), Node(b"c/e")),),
        (Step(Rename(b"c", b"a")), Step(Rename(b"c", b"a", RENAME_EXCHANGE))),
    ),
    "a metacopy with other names says by path where its data is": Script(
        "metacopy",
        ((Node(b"f", data=b"data"), Node(b"d/g", "link", b"f"), Node(b"d/h", "link", b"f")),),
        (
            Step(Rename(b"f", b"e")),
            Step(Remount()),
            Step(Rename(b"d/g", b"d/i")),
            Step(Remount()),
            Step(Read(b"d/i")),
            Step(Read(b"d/h")),
        ),
    ),
    "a directory of the upper layer alone that gets a copy by a link is marked": Script(
        "privileged",
        ((Node(b"f", data=b"f"), Node(b"d/lower")),),
        (Step(Mkdir(b"d/new")), Step(Link(b"f", b"d/new/f"))),
    ),
    "opening with truncation takes set-id bits from those who may not keep them": Script(
        "privileged",
        tuple((Node(name, data=b"f", mode=0o6777),) for name in (b"a", b"b", b"c")),
        (
            Step(Stat(b"a")),
            Step(Open(0, b"a", os.O_RDWR | os.O_TRUNC), who=1),
            Step(Stat(b"a")),
            Step(Write(b"b", size=1), who=1),
            Step(Truncate(b"c"), who=1),
            Step(Chmod(b"c", 0o6777)),
            Step(Open(1, b"c", os.O_WRONLY | os.O_TRUNC)),
            Step(HandleWrite(1), who=1),
            Step(MapWrite(b"b"), who=1),
        ),
    ),
    "a metacopy says where its data is in the merged lower layers, not in one of them": Script(
        "metacopy",
        (
            (Node(b"new", "dir", xattrs=(("@redirect", b"old"),)), Node(b"old", "whiteout")),
            (Node(b"old/f", data=b"data"),),
        ),
        (Step(Link(b"new/f", b"g")), Step(Remount()), Step(Read(b"g")), Step(Read(b"new/f"))),
    ),
    "a redirect that may not be followed does no harm where nothing is below": Script(
        "userxattr",
        (
            (Node(b"d/e", "dir", xattrs=(("@redirect", b"/x"),)), Node(b"f", "dir", xattrs=(("@redirect", b"x"),))),
            (Node(b"x/y"),),
        ),
        (
            Step(Readdir(b"d/e")),
            Step(Stat(b"f")),
            Step(Readdir(b"")),
            Step(Chmod(b"d/e", 0o700)),
            Step(Remount()),
            Step(Readdir(b"d/e")),
        ),
    ),
    "an opaque directory does not hide the data of a metacopy in it": Script(
        "metacopy",
        ((Node(b"f", data=b"data"),),),
        (
            Step(Mkdir(b"d")),
            Step(Rename(b"f", b"d/f")),
            Step(Rotate()),
            Step(Rename(b"d/f", b"g")),
            Step(Remount()),
            Step(Read(b"g")),
            Step(Rotate()),
            Step(Read(b"g")),
        ),
    ),
}
