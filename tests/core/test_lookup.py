"""Which object a name leads to: whiteouts of all kinds, opaque directories, redirects, metacopies."""

import errno
import os
import stat
from collections.abc import Callable

import pytest

from overlayfs_py.core import lookup
from overlayfs_py.core.nodes import Real
from overlayfs_py.core.overlay import Overlay
from overlayfs_py.sys.rename import RENAME_WHITEOUT, renameat2
from tests.core.conftest import Maker
from tests.core.rig import Rig
from tests.support.trees import Node

A_FILE = (Node(b"a", data=b"bottom"),)
A_DIR = (Node(b"d/x", data=b"bottom x"), Node(b"d/y", data=b"bottom y"))


def fails_with(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as raised:
        call()
    assert raised.value.errno == number, raised.value


def shown(rig: Rig, path: bytes = b"") -> set[bytes]:
    """The names of a directory: the listing and lookups have to agree on them."""
    names = rig.names(path)
    prefix = path + b"/" if path else b""
    assert all(rig.exists(prefix + name) for name in names)
    return names


def test_the_topmost_layer_that_has_a_name_wins(make: Maker) -> None:
    rig = make((Node(b"a", data=b"top"),), A_FILE, upper=(Node(b"b", data=b"upper"),))
    assert rig.read(b"a") == b"top"
    assert rig.read(b"b") == b"upper"
    assert shown(rig) == {b"a", b"b"}


def test_directories_of_all_layers_merge(make: Maker) -> None:
    rig = make((Node(b"d/x", data=b"top x"), Node(b"d/z", data=b"z")), A_DIR, upper=(Node(b"d/u", data=b"u"),))
    assert shown(rig, b"d") == {b"x", b"y", b"z", b"u"}
    assert rig.read(b"d/x") == b"top x"
    assert rig.read(b"d/y") == b"bottom y"


def test_a_file_ends_the_merge_of_directories_above_it(make: Maker) -> None:
    rig = make((Node(b"d/top", data=b""),), (Node(b"d", data=b"a file"),), (Node(b"d/bottom", data=b""),))
    assert shown(rig, b"d") == {b"top"}


def test_a_file_hides_a_directory(make: Maker) -> None:
    rig = make((Node(b"d", data=b"a file"),), A_DIR)
    assert rig.read(b"d") == b"a file"


WHITEOUTS = {
    "device": (Node(b"a", kind="whiteout"),),
    "dot": (Node(b".wh.a"),),
    "xattr": (Node(b"", kind="dir", xattrs=(("@opaque", b"x"),)), Node(b"a", xattrs=(("@whiteout", b""),))),
}


@pytest.mark.parametrize("style", WHITEOUTS)
@pytest.mark.parametrize("where", ["upper", "lower"])
@pytest.mark.parametrize("userxattr", [False, True])
def test_a_whiteout_hides_the_layers_below(make: Maker, style: str, where: str, userxattr: bool) -> None:
    below = (*A_FILE, Node(b"b", data=b"b"))
    if where == "upper":
        rig = make(below, upper=WHITEOUTS[style], userxattr=userxattr)
    else:
        rig = make(WHITEOUTS[style], below, userxattr=userxattr)
    assert shown(rig) == {b"b"}
    assert not rig.exists(b"a")
    assert not rig.exists(b".wh.a")


@pytest.mark.parametrize("style", WHITEOUTS)
def test_a_whiteout_does_not_hide_the_layers_above(make: Maker, style: str) -> None:
    rig = make(WHITEOUTS[style], A_FILE, upper=(Node(b"a", data=b"upper"),))
    assert rig.read(b"a") == b"upper"
    assert shown(rig) == {b"a"}


@pytest.mark.parametrize("style", WHITEOUTS)
def test_a_whiteout_in_a_subdirectory_hides_one_name(make: Maker, style: str) -> None:
    marks = {
        "device": (Node(b"d/x", kind="whiteout"),),
        "dot": (Node(b"d/.wh.x"),),
        "xattr": (
            Node(b"", kind="dir", xattrs=(("@opaque", b"x"),)),
            Node(b"d", kind="dir", xattrs=(("@opaque", b"x"),)),
            Node(b"d/x", xattrs=(("@whiteout", b""),)),
        ),
    }
    rig = make(marks[style], A_DIR)
    assert shown(rig, b"d") == {b"y"}


def test_a_dot_whiteout_beside_a_directory_ends_the_stack_there(make: Maker) -> None:
    rig = make((Node(b"d/top"), Node(b".wh.d")), A_DIR)
    assert shown(rig, b"d") == {b"top"}
    assert shown(rig) == {b"d"}


def test_a_dot_whiteout_hides_nothing_beside_it(make: Maker) -> None:
    rig = make((Node(b"a", data=b"top"), Node(b".wh.a")), A_FILE)
    assert rig.read(b"a") == b"top"
    assert shown(rig) == {b"a"}


OPAQUE = {
    "kernel": (Node(b"d/top"), Node(b"d", kind="dir", xattrs=(("@opaque", b"y"),))),
    "dot": (Node(b"d/top"), Node(b"d/.wh..wh..opq")),
    "fuse-overlayfs": (Node(b"d/top"), Node(b"d", kind="dir", xattrs=(("user.fuseoverlayfs.opaque", b"y"),))),
}


@pytest.mark.parametrize("style", OPAQUE)
@pytest.mark.parametrize("where", ["upper", "lower"])
@pytest.mark.parametrize("userxattr", [False, True])
def test_an_opaque_directory_hides_the_layers_below(make: Maker, style: str, where: str, userxattr: bool) -> None:
    if where == "upper":
        rig = make(A_DIR, upper=OPAQUE[style], userxattr=userxattr)
    else:
        rig = make(OPAQUE[style], A_DIR, userxattr=userxattr)
    assert shown(rig, b"d") == {b"top"}
    assert not rig.exists(b"d/x")


def test_marks_of_the_other_namespace_mean_nothing(make: Maker) -> None:
    marked = (Node(b"d/top"), Node(b"d", kind="dir", xattrs=(("trusted.overlay.opaque", b"y"),)))
    rig = make(marked, A_DIR, userxattr=True)
    assert shown(rig, b"d") == {b"top", b"x", b"y"}


def test_a_character_device_that_is_not_null_is_shown(make: Maker) -> None:
    rig = make((Node(b"a", kind="chr", rdev=(0, 1)),), A_FILE)
    assert stat.S_ISCHR(rig.attr(b"a").mode)


def test_an_empty_file_is_no_whiteout_without_the_mark(make: Maker) -> None:
    rig = make((Node(b"", kind="dir", xattrs=(("@opaque", b"x"),)), Node(b"a")), A_FILE)
    assert rig.read(b"a") == b""


REDIRECTS = {
    "absolute": (Node(b"n/m", kind="dir", xattrs=(("@redirect", b"/d"),)),),
    "relative": (Node(b"m", kind="dir", xattrs=(("@redirect", b"d"),)),),
}


@pytest.mark.parametrize("style", REDIRECTS)
@pytest.mark.parametrize("where", ["upper", "lower"])
def test_a_redirect_says_where_the_lower_parts_are(make: Maker, style: str, where: str) -> None:
    path = REDIRECTS[style][0].path
    layer = (*REDIRECTS[style], Node(path + b"/top"))
    rig = make(A_DIR, upper=layer) if where == "upper" else make(layer, A_DIR)
    assert shown(rig, path) == {b"top", b"x", b"y"}
    assert rig.read(path + b"/x") == b"bottom x"


def test_redirects_add_up_over_layers(make: Maker) -> None:
    rig = make(
        (Node(b"second", kind="dir", xattrs=(("@redirect", b"first"),)),),
        (Node(b"deep/first", kind="dir", xattrs=(("@redirect", b"/d"),)),),
        A_DIR,
        upper=(Node(b"third", kind="dir", xattrs=(("@redirect", b"/deep/first"),)),),
    )
    assert shown(rig, b"third") == {b"x", b"y"}
    assert shown(rig, b"second") == set()


def test_a_relative_redirect_is_a_name_beside_the_parents_lower_parts(make: Maker) -> None:
    """The parent was moved itself: its own redirect is followed first."""
    rig = make(
        (Node(b"p/d/x", data=b"x"),),
        upper=(
            Node(b"q", kind="dir", xattrs=(("@redirect", b"p"),)),
            Node(b"q/e", kind="dir", xattrs=(("@redirect", b"d"),)),
            Node(b"q/d", kind="whiteout"),
            Node(b"p", kind="whiteout"),
        ),
    )
    assert rig.read(b"q/e/x") == b"x"
    assert shown(rig) == {b"q"}


def test_a_redirect_to_something_else_than_a_directory_is_no_merge(make: Maker) -> None:
    rig = make(A_FILE, upper=(Node(b"m", kind="dir", xattrs=(("@redirect", b"a"),)), Node(b"m/top")))
    assert shown(rig, b"m") == {b"top"}


def test_a_redirect_is_refused_with_nofollow(make: Maker) -> None:
    rig = make(A_DIR, upper=REDIRECTS["relative"], redirect_dir="nofollow")
    fails_with(errno.EPERM, lambda: rig.node(b"m"))


def test_redirects_are_not_followed_by_default_without_privilege(make: Maker) -> None:
    rig = make(A_DIR, upper=REDIRECTS["relative"], userxattr=True)
    fails_with(errno.EPERM, lambda: rig.node(b"m"))
    assert shown(make.again(rig, redirect_dir="on"), b"m") == {b"x", b"y"}


@pytest.mark.parametrize("redirect", [b"", b"/", b"/..", b"..", b".", b"/d/../d", b"//d", b"d/x", b"/" + b"n" * 256])
def test_a_redirect_that_is_no_path_is_an_error_or_nothing(make: Maker, redirect: bytes) -> None:
    rig = make(A_DIR, upper=(Node(b"m", kind="dir", xattrs=(("@redirect", redirect),)),))
    if redirect:
        fails_with(errno.EIO, lambda: rig.node(b"m"))
    else:
        assert shown(rig, b"m") == set()


METACOPY = (("@metacopy", b""),)


def test_a_metacopy_shows_its_own_attributes_and_the_data_below(make: Maker) -> None:
    rig = make((Node(b"a", mode=0o600, size=6, xattrs=METACOPY),), A_FILE, metacopy=True)
    assert rig.read(b"a") == b"bottom"
    assert stat.S_IMODE(rig.attr(b"a").mode) == 0o600


def test_a_metacopy_with_a_redirect_finds_its_data_under_another_name(make: Maker) -> None:
    moved = (("@metacopy", b""), ("@redirect", b"/a"))
    rig = make(A_FILE, upper=(Node(b"d/moved", size=6, xattrs=moved),), metacopy=True)
    assert rig.read(b"d/moved") == b"bottom"


def test_the_redirect_of_a_metacopy_is_refused_without_metacopy(make: Maker) -> None:
    moved = (("@metacopy", b""), ("@redirect", b"/a"))
    rig = make(A_FILE, upper=(Node(b"moved", size=6, xattrs=moved),))
    fails_with(errno.EPERM, lambda: rig.node(b"moved"))


def test_a_metacopy_without_data_is_an_error(make: Maker) -> None:
    rig = make(A_FILE, upper=(Node(b"b", size=6, xattrs=METACOPY),), metacopy=True)
    fails_with(errno.EIO, lambda: rig.node(b"b"))


def test_metacopies_of_metacopies_lead_to_the_data(make: Maker) -> None:
    rig = make(
        (Node(b"a", size=6, xattrs=METACOPY),),
        A_FILE,
        upper=(Node(b"a", size=6, mode=0o604, xattrs=METACOPY),),
        metacopy=True,
    )
    assert rig.read(b"a") == b"bottom"
    assert rig.attr(b"a").blocks > 0


def test_a_data_only_layer_is_reached_through_a_redirect_alone(make: Maker) -> None:
    data = make.layers.add("data")
    (data / "blobs").mkdir()
    (data / "blobs/1").write_bytes(b"from the data layer")
    redirected = (("@metacopy", b""), ("@redirect", b"/blobs/1"))
    rig = make((Node(b"a", size=19, xattrs=redirected),), metacopy=True, datadirs=(os.fsencode(data),))
    assert rig.read(b"a") == b"from the data layer"
    assert shown(rig) == {b"a"}
    rig.write(b"a", b"F")
    assert rig.read(b"a") == b"From the data layer"
    assert (data / "blobs/1").read_bytes() == b"from the data layer"


def test_a_name_of_more_than_255_bytes_is_too_long(make: Maker) -> None:
    rig = make(A_FILE)
    fails_with(errno.ENAMETOOLONG, lambda: rig.node(b"n" * 256))
    assert not rig.exists(b"n" * 255)


def test_names_are_bytes(make: Maker) -> None:
    rig = make((Node(b"\xff\xfe\n", data=b"odd"), Node(b"n" * 255, data=b"long")))
    assert rig.read(b"\xff\xfe\n") == b"odd"
    assert shown(rig) == {b"\xff\xfe\n", b"n" * 255}


def test_a_rename_that_leaves_a_whiteout_made_by_the_kernel_is_understood(make: Maker) -> None:
    rig = make((Node(b"a", data=b"top"),), A_FILE)
    top = os.open(make.base / "lower0", os.O_PATH)
    try:
        renameat2(top, b"a", top, b"b", RENAME_WHITEOUT)
    finally:
        os.close(top)
    assert shown(make.again(rig)) == {b"b"}


def test_a_tree_deeper_than_a_path_can_be_is_reached(make: Maker) -> None:
    rig = make(())
    folder = make.base / "lower0"
    here = os.open(folder, os.O_PATH)
    for _ in range(40):
        os.mkdir(b"n" * 250, dir_fd=here)
        below = os.open(b"n" * 250, os.O_PATH, dir_fd=here)
        os.close(here)
        here = below
    os.mkdir(b"end", dir_fd=here)
    os.close(here)
    path = b"/".join([b"n" * 250] * 40 + [b"end"])
    rig.create(path + b"/new", b"deep")
    assert rig.read(path + b"/new") == b"deep"


@pytest.mark.parametrize("style", WHITEOUTS)
def test_what_whiteouts_hide_stays_hidden_once_a_directory_is_known_by_its_listing(make: Maker, style: str) -> None:
    rig = make(WHITEOUTS[style], (*A_FILE, Node(b"b", data=b"b")))
    for number in range(100):
        assert not rig.exists(b"missing%d" % number)
    assert rig.fs.root in rig.fs.merged.by_node
    assert not rig.exists(b"a")
    assert rig.read(b"b") == b"b"
    rig.create(b"missing7", b"made")
    assert rig.read(b"missing7") == b"made"
    assert shown(rig) == {b"b", b"missing7"}


def test_names_missing_from_a_directory_known_by_its_listing_are_not_looked_for(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make(A_FILE, A_DIR, upper=None)
    for number in range(100):
        assert not rig.exists(b"missing%d" % number)
    asked: list[bytes] = []
    entry = lookup.entry

    def asking(fs: Overlay, base: Real, name: bytes) -> object:
        asked.append(name)
        return entry(fs, base, name)

    monkeypatch.setattr(lookup, "entry", asking)
    assert not rig.exists(b"another")
    assert asked == []
    assert rig.read(b"a") == b"bottom"
    assert asked == [b"a"]


def test_a_large_directory_is_not_listed_for_a_few_missing_names(make: Maker) -> None:
    rig = make(tuple(Node(b"name%04d" % number) for number in range(2000)), upper=None)
    for number in range(10):
        assert not rig.exists(b"missing%d" % number)
    assert not rig.fs.merged.by_node
