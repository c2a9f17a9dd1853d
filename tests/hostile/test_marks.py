"""Junk in the xattrs that are the overlay's own: an error or nothing, never a crash, never a way out."""

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from overlayfs_py.core import marks
from overlayfs_py.sys import handles
from tests.core.conftest import Maker
from tests.core.rig import Rig
from tests.hostile.canary import Canary
from tests.support.trees import Kind, Node

KEYS = "opaque redirect origin impure nlink upper metacopy whiteout literal uuid protattr".split()
# What a request may be told; anything but OSError would be logged as unexpected.
FAIR = {
    errno.EIO,
    errno.EPERM,
    errno.ENOENT,
    errno.ESTALE,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOTEMPTY,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENODATA,
    errno.EOPNOTSUPP,
}


@contextmanager
def fairly() -> Iterator[None]:
    """What goes on inside may fail, as requests fail."""
    try:
        yield
    except OSError as error:
        assert error.errno in FAIR, error


def use(rig: Rig, path: bytes) -> None:
    """All there is to do with a name."""
    calls: tuple[Callable[[], object], ...] = (
        lambda: rig.attr(path),
        lambda: rig.xattrs(path),
        lambda: rig.names(path),
        lambda: rig.read(path),
        lambda: rig.change(path, mode=0o700),
        lambda: rig.write(path, b"W"),
        lambda: rig.link(path, path + b".link"),
        lambda: rig.rename(path, path + b".moved"),
        lambda: rig.create(path + b".moved/new"),
        lambda: rig.unlink(path + b".link"),
        lambda: rig.unlink(path + b".moved/new"),
        lambda: rig.unlink(path + b".moved"),
        lambda: rig.rmdir(path + b".moved"),
        lambda: rig.mkdir(path),
    )
    for call in calls:
        with fairly():
            call()


def junk(dice: random.Random) -> bytes:
    """A value no mark should have; now and then nearly one."""
    origin = marks.pack_handle(dice.randrange(256), dice.randbytes(dice.choice((0, 4, 8, 12, 20, 128, 200))), bytes(16))
    return dice.choice(
        (
            b"",
            b"y",
            b"x",
            b"\0",
            b"/",
            b"//",
            b"..",
            b"/..",
            b"/../../etc",
            b"../outside",
            b"/link/secret",
            b"link/secret",
            b"a\0b",
            b"/a\0b",
            b"/d0",
            b"d1",
            b"/d0/../d1",
            b"\xff\xfe",
            b"/n" * 300,
            b"n" * 256,
            b"/" + b"n" * 255,
            b"U+1",
            b"U-99999",
            b"L+0",
            b"L-5",
            b"U+99999999999999999999",
            b"\0\4\0\0",
            b"\0\x24\0\1" + dice.randbytes(32),
            origin,
            origin[: dice.randrange(len(origin))],
            dice.randbytes(dice.randrange(1, 60)),
            dice.randbytes(1000),
        )
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("userxattr", [False, True])
def test_junk_in_the_marks_is_an_error_or_nothing(make: Maker, canary: Canary, seed: int, userxattr: bool) -> None:
    dice = random.Random(seed)

    def layer() -> tuple[Node, ...]:
        nodes = [Node(b"link", "symlink", data=os.fsencode(canary.path)), Node(b"linked", data=b"l")]
        for number in range(8):
            kinds: dict[bytes, Kind] = {b"d%d": "dir", b"f%d": "file", b"d%d/f": "file", b"d%d/sub": "dir"}
            for path, kind in kinds.items():
                keys = dice.sample(KEYS, dice.randrange(1, 4))
                xattrs = tuple((f"@{key}", junk(dice)) for key in keys)
                nodes.append(Node(path % number, kind, data=b"data" if kind == "file" else b"", xattrs=xattrs))
        nodes.append(Node(b"f0.twin", "link", data=b"linked"))
        return tuple(nodes)

    options = {"redirect_dir": "on", "metacopy": seed % 2 == 1 and not userxattr, "userxattr": userxattr}
    rig = make(layer(), layer(), layer(), upper=layer(), **options)
    for round_ in range(2):
        for number in range(8):
            for path in (b"f%d", b"d%d/f", b"d%d/sub", b"d%d"):
                use(rig, path % number)
        with fairly():
            rig.names()
        if not round_:
            make.again(rig)


REDIRECTS = (
    b"/../outside",
    b"/../../outside",
    b"../outside",
    b"/link",
    b"/link/sub",
    b"link",
    b"/d/link/sub",
    b"/proc",
    b"/./d",
    b"/d/",
    b"d\0e",
    b"/" + b"d/" * 2000,
)


@pytest.mark.parametrize("redirect", REDIRECTS)
@pytest.mark.parametrize("kind", ["dir", "file"])
def test_a_redirect_leads_nowhere_but_into_the_layers(make: Maker, canary: Canary, redirect: bytes, kind: str) -> None:
    out = os.fsencode(canary.path)
    below = (Node(b"link", "symlink", data=out), Node(b"d/link", "symlink", data=out), Node(b"d/x", data=b"x"))
    marked = (("@redirect", redirect), *((("@metacopy", b""),) if kind == "file" else ()))
    rig = make(below, upper=(Node(b"m", kind, size=6, xattrs=marked),), metacopy=True)  # type: ignore[arg-type]
    with fairly():
        assert rig.names(b"m") == set() if kind == "dir" else not rig.read(b"m").strip(b"\0")
    use(rig, b"m")


def test_redirects_in_a_circle_end(make: Maker) -> None:
    circle = (
        Node(b"a", "dir", xattrs=(("@redirect", b"/b"),)),
        Node(b"b", "dir", xattrs=(("@redirect", b"/a"),)),
        Node(b"c", "dir", xattrs=(("@redirect", b"/c/c"),)),
        Node(b"c/c", "dir", xattrs=(("@redirect", b"/c"),)),
    )
    rig = make(*[circle] * 30, (Node(b"a/end", data=b"end"),), upper=circle)
    assert sum(rig.names(path) == {b"end"} for path in (b"a", b"b")) == 1
    for path in (b"a", b"b", b"c", b"c/c"):
        use(rig, path)


def test_metacopies_in_a_circle_have_no_data(make: Maker) -> None:
    circle = tuple(
        Node(name, size=5, xattrs=(("@metacopy", b""), ("@redirect", other)))
        for name, other in ((b"a", b"/b"), (b"b", b"/a"))
    )
    rig = make(*[circle] * 20, metacopy=True)
    for path in (b"a", b"b"):
        with pytest.raises(OSError) as raised:
            rig.read(path)
        assert raised.value.errno == errno.EIO
        use(rig, path)


def test_a_forged_origin_gives_no_access_to_a_file_outside(make: Maker, canary: Canary) -> None:
    folder = os.open(canary.path, os.O_RDONLY)
    try:
        kind, handle = handles.file_handle(folder, b"secret")
        uuid = handles.filesystem_uuid(folder) or bytes(16)
    finally:
        os.close(folder)
    canary.touches()
    origin = marks.pack_handle(kind, handle, uuid)
    forged = (("@origin", origin), ("@nlink", b"L+0"))
    layer = (Node(b"a", data=b"mine", xattrs=forged), Node(b"d", "dir", xattrs=forged), Node(b"b", "link", data=b"a"))
    rig = make(layer, upper=layer)
    for path in (b"a", b"b"):
        assert rig.read(path) == b"mine"
    rig.write(b"a", b"M")
    for path in (b"a", b"b", b"d"):
        use(rig, path)


def test_an_origin_that_two_files_claim_makes_them_no_one_file(make: Maker) -> None:
    rig = make((Node(b"a", data=b"a"), Node(b"b", data=b"b")))
    rig.write(b"a", b"A")
    origin = os.getxattr(make.upper / "a", "trusted.overlay.origin")
    rig.create(b"c", b"c")
    rig.create(b"e", b"e")
    for name in ("c", "e"):
        os.setxattr(make.upper / name, "trusted.overlay.origin", origin)
    make.again(rig)
    assert {path: rig.read(path) for path in (b"a", b"c", b"e")} == {b"a": b"A", b"c": b"c", b"e": b"e"}
    assert len({rig.attr(path).ino for path in (b"a", b"c", b"e")}) == 3
