"""Layer stacks to run over: nasty ones written by hand, and random ones."""

import random
import stat
from dataclasses import replace
from typing import Final

from tests.differential.side import Profile
from tests.support.trees import ACL_ACCESS, ACL_DEFAULT, USER, Kind, Layer, Node, Stack, acl

NAMES: Final = (b"a", b"b", b"c", b"d", b"e", "ü".encode(), b"\xff\xfe", b"n" * 255)
TARGETS: Final = (b"a", b"b/c", b"./a", b"missing", b"/nonexistent/x", b"d", b"t" * 300)

_NOBODY: Final = 0xFFFFFFFF
_CAPABILITY: Final = bytes.fromhex("0100000200040000000000000000000000000000")
_ACCESS: Final = acl((1, 6, _NOBODY), (2, 7, 1001), (4, 4, _NOBODY), (16, 7, _NOBODY), (32, 0, _NOBODY))
_DEFAULT: Final = acl((1, 7, _NOBODY), (2, 5, 1001), (4, 5, _NOBODY), (8, 6, 2000), (16, 7, _NOBODY), (32, 0, _NOBODY))

ACLS: Final = {
    "access": (ACL_ACCESS, _ACCESS),
    "default": (ACL_DEFAULT, _DEFAULT),
    "minimal": (ACL_ACCESS, acl((1, 6, _NOBODY), (4, 4, _NOBODY), (32, 4, _NOBODY))),
    "broken": (ACL_ACCESS, b"\2\0\0\0\1"),
}
CAPABILITY: Final = ("security.capability", _CAPABILITY)


def _dir(path: bytes, mode: int = 0o755, uid: int = 0, gid: int = 0, **marks: bytes) -> Node:
    return Node(
        path, "dir", mode=mode, uid=uid, gid=gid, xattrs=tuple((f"@{name}", value) for name, value in marks.items())
    )


def _out(path: bytes) -> Node:
    return Node(path, "whiteout")


def _link(path: bytes, to: bytes) -> Node:
    return Node(path, "link", to)


_WHITEOUTS: Final[Stack] = (
    (Node(b"top", data=b"0"), _out(b"gone"), _out(b"dir-gone"), _dir(b"back", uid=1000), Node(b"back/new", data=b"n")),
    (
        Node(b"file-over-dir", data=b"file"),
        _dir(b"dir-over-file"),
        Node(b"dir-over-file/in", data=b"in"),
        _dir(b"opaque", opaque=b"y"),
        Node(b"opaque/only", data=b"only"),
        _out(b"back"),
        _dir(b"partly"),
        _out(b"partly/a"),
        _out(b"never-was"),
    ),
    (
        Node(b"gone", data=b"gone"),
        Node(b"dir-gone/deep/er", data=b"x"),
        Node(b"back/old", data=b"o"),
        Node(b"file-over-dir/hidden", data=b"h"),
        Node(b"dir-over-file", data=b"f"),
        Node(b"opaque/hidden", data=b"h"),
        Node(b"partly/a", data=b"a"),
        Node(b"partly/b", data=b"b", uid=1000, gid=1000),
        Node(b"partly/c/d", data=b"d"),
    ),
    (Node(b"partly/c/e", data=b"e"), Node(b"gone/was-dir", data=b"w"), Node(b"opaque/below", data=b"l")),
)

_LINKS: Final[Stack] = (
    (Node(b"x/over", data=b"over"), _out(b"y/two")),
    (
        Node(b"x/one", data=b"linked" * 100, uid=1000, gid=1000, mode=0o664),
        _link(b"y/two", b"x/one"),
        _link(b"y/three", b"x/one"),
        _link(b"four", b"x/one"),
        Node(b"s", "symlink", b"four"),
        _link(b"x/s", b"s"),
        Node(b"pipe", "fifo", mode=0o622),
        _link(b"y/pipe", b"pipe"),
    ),
    (
        Node(b"x/over", data=b"under"),
        _link(b"x/under", b"x/over"),
        _link(b"y/over", b"x/over"),
        Node(b"y/z/q", data=b"q"),
    ),
)

_MODES: Final[Stack] = (
    (
        _dir(b"t", 0o1777),
        Node(b"t/mine", data=b"m", uid=1000, gid=1000),
        Node(b"t/his", data=b"h", uid=1001, mode=0o666),
    ),
    (
        _dir(b"g", 0o2775, 0, 2000),
        Node(b"g/f", data=b"g", uid=1000, gid=2000, mode=0o664),
        _dir(b"g/sub", 0o2775, 1000, 2000),
        Node(b"suid", data=b"#!", mode=0o4755),
        Node(b"sgid", data=b"#!", mode=0o2755, uid=1000, gid=1000),
        Node(b"both", data=b"#!", mode=0o6777),
        Node(b"locks", data=b"mandatory", mode=0o2666),
        Node(b"caps", data=b"#!", mode=0o755, xattrs=(CAPABILITY,)),
        Node(b"caps-all", data=b"#!", mode=0o6777, xattrs=(CAPABILITY,)),
        _dir(b"private", 0o700),
        Node(b"private/x", data=b"p", mode=0o666),
        Node(b"none", data=b"n", mode=0),
        _dir(b"readonly", 0o555, 1000, 1000),
        Node(b"readonly/f", data=b"r", mode=0o444, uid=1000, gid=1000),
        Node(b"open", "dir", mode=0o777),
        Node(b"open/w", data=b"w", mode=0o666),
    ),
    (Node(b"t/root", data=b"r"), Node(b"g/low", data=b"low", uid=1001, gid=2000, mode=0o660)),
)

_ACLS: Final[Stack] = (
    (Node(b"d", "dir", mode=0o770, xattrs=(ACLS["default"], ACLS["access"])),),
    (
        Node(b"d", "dir", mode=0o755),
        Node(b"d/f", data=b"f", mode=0o640, xattrs=(ACLS["access"],)),
        Node(b"d/sub", "dir", xattrs=(ACLS["default"],)),
        Node(
            b"x", data=b"x", xattrs=(("user.a", b"1"), ("user.b", b""), ("trusted.t", b"t" * 500), ("security.s", b"s"))
        ),
        Node(b"l", "symlink", b"x", xattrs=(("trusted.on-link", b"1"),)),
        Node(b"e", "dir", xattrs=(("user.dir", b"d"), ("trusted.d", b"d"))),
    ),
)

_NAMES: Final[Stack] = (
    (Node(b"n" * 255, data=b"long"), _out(b"\xff\xfe"), Node(b" ", data=b"space")),
    (
        Node(b"\xff\xfe", data=b"not utf-8"),
        Node("ü/ö".encode(), data=b"umlaut"),
        Node(b"m" * 255 + b"/" + b"o" * 255 + b"/f", data=b"deep long"),
        Node(b"new\nline", data=b"nl"),
        Node(b"-rf", data=b"dash"),
        Node(b"a:b,c\\d", data=b"punctuation"),
        Node(b"/".join([b"deep"] * 40) + b"/f", data=b"deep"),
        Node(b"long-link", "symlink", b"t" * 4000),
        Node(b"#1", data=b"looks like a temporary"),
    ),
)

_SPECIAL: Final[Stack] = (
    (Node(b"null", "chr", rdev=(1, 3), mode=0o666), Node(b"over", "socket", mode=0o700)),
    (
        Node(b"zero", "chr", rdev=(1, 5), mode=0o666),
        Node(b"disk", "blk", rdev=(7, 200), mode=0o660, gid=1000),
        Node(b"pipe", "fifo", mode=0o640, uid=1000),
        Node(b"sock", "socket", mode=0o777),
        Node(b"over", "fifo"),
        Node(b"dangling", "symlink", b"nowhere"),
        Node(b"to-dir", "symlink", b"real"),
        Node(b"real/file", data=b"r"),
        Node(b"to-file", "symlink", b"real/file", uid=1000, gid=1000),
        Node(b"loop", "symlink", b"loop"),
        Node(b"absolute", "symlink", b"/nonexistent/x"),
        Node(b"hole", size=1 << 20),
        Node(b"tail-hole", data=b"head", size=300_000),
        Node(b"big", data=bytes(range(256)) * 800, mode=0o666),
        Node(b"empty", mode=0o666),
    ),
)

_REDIRECTS: Final[Stack] = (
    (_dir(b"twice", redirect=b"moved"), _out(b"moved"), Node(b"twice/top", data=b"top")),
    (
        _dir(b"moved", redirect=b"/orig/inner"),
        _dir(b"orig"),
        _out(b"orig/inner"),
        Node(b"moved/added", data=b"added"),
        _dir(b"relative", redirect=b"was-relative"),
        _out(b"was-relative"),
        _dir(b"dangling", redirect=b"/no/such"),
        Node(b"dangling/own", data=b"own"),
        _dir(b"to-file", redirect=b"/orig/file"),
        _dir(b"opaque-redirect", opaque=b"y", redirect=b"/orig"),
    ),
    (
        Node(b"orig/inner/f", data=b"f"),
        Node(b"orig/inner/sub/g", data=b"g"),
        Node(b"orig/file", data=b"file"),
        Node(b"was-relative/h", data=b"h"),
        Node(b"relative/hidden", data=b"hidden"),
        Node(b"dangling/below", data=b"below"),
        Node(b"moved/hidden", data=b"hidden"),
    ),
    (Node(b"orig/inner/sub/lowest", data=b"lowest"), Node(b"orig/other", data=b"o"), Node(b"twice/hidden", data=b"h")),
)

_MARKS: Final[Stack] = (
    (
        Node(b"nested", "dir", xattrs=(("@overlay.opaque", b"y"), ("@overlay.whatever", b"1"))),
        Node(b"nested/f", data=b"f", xattrs=(("@overlay.metacopy", b""),)),
        Node(b"odd-opaque", "dir", xattrs=(("@opaque", b"n"),)),
        Node(b"odd-opaque/f", data=b"f"),
        Node(b"junk", data=b"junk", xattrs=(("@junk", b"junk"), ("@impure", b"y"))),
    ),
    (
        Node(b"nested/below", data=b"below"),
        Node(b"odd-opaque/below", data=b"below"),
    ),
)

NASTY: Final[dict[str, Stack]] = {
    "whiteouts": _WHITEOUTS,
    "links": _LINKS,
    "modes": _MODES,
    "acls": _ACLS,
    "names": _NAMES,
    "special": _SPECIAL,
    "redirects": _REDIRECTS,
    "marks": _MARKS,
}


def fitting(stack: Stack, profile: Profile) -> Stack:
    """The stack without what takes more than the profile has: see SKIPPED in known.py."""
    return tuple(_fitting_layer(layer, profile) for layer in stack)


def _fitting_layer(layer: Layer, profile: Profile) -> Layer:
    if profile.prefix != USER:
        return layer
    if not profile.user_namespace:
        files = {node.path for node in layer if node.kind == "file"}
        return tuple(node for node in layer if node.kind != "link" or node.data in files)
    kept = (node for node in layer if node.kind not in ("link", "chr", "blk"))
    return tuple(replace(node, xattrs=_unprivileged(node.xattrs)) for node in kept)


def _unprivileged(xattrs: tuple[tuple[str, bytes], ...]) -> tuple[tuple[str, bytes], ...]:
    return tuple((name, value) for name, value in xattrs if not name.startswith(("trusted.", "security.")))


_KINDS: Final[tuple[Kind, ...]] = ("file", "dir", "file", "dir", "symlink", "link", "whiteout", "fifo", "file", "chr")
_DIR_MODES: Final = (0o755, 0o755, 0o777, 0o1777, 0o2775, 0o700)
_FILE_MODES: Final = (0o644, 0o666, 0o664, 0o600, 0o4755, 0o2755, 0o755)


def any_stack(source: random.Random, profile: Profile) -> Stack:
    """A stack for a profile: one of the nasty ones, or a random one."""
    return fitting(source.choice([*NASTY.values()]) if source.randrange(2) else random_stack(source), profile)


def random_stack(source: random.Random) -> Stack:
    """One to four layers over a small set of names, so that they meet."""
    layers: list[Layer] = []
    for _ in range(source.randint(1, 4)):
        layers.append(_random_layer(source, layers))
    return tuple(reversed(layers))


def _random_layer(source: random.Random, below: list[Layer]) -> Layer:
    """A layer over those in `below`, lowest first."""
    nodes: dict[bytes, Node] = {}
    directories = [b""]
    for _ in range(source.randint(1, 14)):
        parent = source.choice(directories)
        path = (parent + b"/" if parent else b"") + source.choice(NAMES[:6] if source.randrange(8) else NAMES)
        if path in nodes:
            continue
        node = _random_node(source, path, nodes)
        nodes[path] = node
        if node.kind == "dir" and path.count(b"/") < 3:
            directories.append(path)
    if below and not source.randrange(3):
        _move_a_directory(source, nodes, directories, below)
    return tuple(nodes.values())


def _move_a_directory(
    source: random.Random, nodes: dict[bytes, Node], directories: list[bytes], below: list[Layer]
) -> None:
    """Add a redirect, and a whiteout where the directory was, as a rename would; nothing if that would not fit."""
    movable = [node.path for layer in below for node in layer if node.kind == "dir"]
    if not movable:
        return
    old = source.choice(movable)
    parent = source.choice(directories)
    new = (parent + b"/" if parent else b"") + source.choice(NAMES[:5])
    kept = [path for path, node in nodes.items() if node.kind != "dir"]
    if new in nodes or _overlap(old, new) or any(_overlap(old, path) for path in kept):
        return
    if old in nodes or any(path.startswith(old + b"/") for path in nodes):
        return
    nodes[new] = Node(new, "dir", xattrs=(("@redirect", b"/" + old),))
    nodes[new + b"/added"] = Node(new + b"/added", data=b"added")
    nodes[old] = _out(old)


def _overlap(one: bytes, other: bytes) -> bool:
    """Whether one path is the other, or leads through it."""
    return (one + b"/").startswith(other + b"/") or (other + b"/").startswith(one + b"/")


def _random_node(source: random.Random, path: bytes, layer: dict[bytes, Node]) -> Node:
    kind = source.choice(_KINDS)
    uid = source.choice((0, 0, 1000, 1001))
    gid = source.choice((0, 0, 1000, 2000))
    others = [node.path for node in layer.values() if node.kind in ("file", "fifo", "symlink")]
    if kind == "link":
        return _link(path, source.choice(others)) if others else Node(path, data=path[:40])
    if kind == "whiteout":
        return _out(path)
    if kind == "symlink":
        return Node(path, "symlink", source.choice(TARGETS), uid=uid, gid=gid)
    if kind == "dir":
        return Node(path, "dir", b"", source.choice(_DIR_MODES), uid, gid, xattrs=_random_dir_xattrs(source))
    if kind == "file":
        data = path[-30:] * source.choice((1, 1, 10, 3000)) if source.randrange(5) else b""
        size = source.choice((0, 0, 0, 200_000))
        mode = source.choice(_FILE_MODES)
        return Node(path, "file", data, mode, uid, gid, size, xattrs=_random_file_xattrs(source))
    return Node(path, kind, b"", source.choice(_FILE_MODES) & ~stat.S_ISUID, uid, gid)


def _random_dir_xattrs(source: random.Random) -> tuple[tuple[str, bytes], ...]:
    what = source.randrange(12)
    if what == 11:
        return (("@opaque", b"y"),)
    if what == 10:
        return (ACLS["default"],)
    if what == 9:
        return (("user.a", b"dir"),)
    return ()


def _random_file_xattrs(source: random.Random) -> tuple[tuple[str, bytes], ...]:
    what = source.randrange(10)
    return {9: (ACLS["access"],), 8: (CAPABILITY,), 7: (("user.a", b"low"), ("trusted.t", b"x"))}.get(what, ())
