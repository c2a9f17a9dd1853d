"""Scripts that once showed a difference."""

from typing import Final

from tests.differential.script import Chmod, Readdir, RemoveXattr, Script, Step, Unlink
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
}
