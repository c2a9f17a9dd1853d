"""Marks that make no sense are found and mended, and marks keep their meaning from one style to the other."""

import os
import subprocess
from pathlib import Path

import pytest

from overlayfs_py.images import ImageError
from overlayfs_py.images.check import Finding, check, check_work
from overlayfs_py.images.convert import convert
from tests.images.rig import since
from tests.support.mounts import kernel_mount, our_mount
from tests.support.trees import Node, Tree, build, compare_trees, read_tree

LOWER = (
    Node(b"dir/kept"),
    Node(b"dir/hidden"),
    Node(b"gone"),
    Node(b"opaque/hidden"),
    Node(b"moved-from/inner"),
    Node(b"big", data=b"x" * 10_000),
)
# Everything here says something of what is below.
SOUND = (
    Node(b"dir/hidden", "whiteout"),
    Node(b"gone", "whiteout"),
    Node(b"opaque", "dir", xattrs=(("@opaque", b"y"),)),
    Node(b"opaque/new"),
    Node(b"moved-to", "dir", xattrs=(("@redirect", b"/moved-from"),)),
    Node(b"moved-from", "whiteout"),
)


@pytest.fixture
def stack(base: Path) -> list[Path]:
    """An upper and a lower layer, empty."""
    paths = [base / "upper", base / "lower"]
    for path in paths:
        path.mkdir()
    return paths


def make(stack: list[Path], upper: tuple[Node, ...], lower: tuple[Node, ...] = LOWER) -> None:
    build(bytes(stack[0]), upper)
    build(bytes(stack[1]), lower)


def shown(stack: list[Path], base: Path, options: str = "redirect_dir=on,metacopy=on") -> Tree:
    """What the kernel shows of the stack."""
    (base / "mnt").mkdir(exist_ok=True)
    with kernel_mount(base / "mnt", stack, None, None, options):
        return read_tree(bytes(base / "mnt"), since())


def found(findings: list[Finding]) -> dict[bytes, str]:
    return {finding.path: finding.kind for finding in findings}


def test_marks_that_make_sense_are_left_alone(stack: list[Path]) -> None:
    make(stack, SOUND)
    assert list(check(stack, repair=True)) == []


@pytest.mark.parametrize("style", ["kernel", "aufs"])
def test_whiteouts_of_nothing_are_found_and_removed(stack: list[Path], base: Path, style: str) -> None:
    dot = b".wh." if style == "aufs" else b""
    kind = "file" if style == "aufs" else "whiteout"
    make(
        stack,
        (
            Node(b"dir/" + dot + b"hidden", kind),  # type: ignore[arg-type]
            Node(b"dir/" + dot + b"nothing", kind),  # type: ignore[arg-type]
            Node(b"new/" + dot + b"x", kind),  # type: ignore[arg-type]
            Node(b"opaque", "dir", xattrs=(("@opaque", b"y"),)),
            Node(b"opaque/" + dot + b"hidden", kind),  # type: ignore[arg-type]
        ),
    )
    expected = {path + dot + name for path, name in ((b"dir/", b"nothing"), (b"new/", b"x"), (b"opaque/", b"hidden"))}
    before = (stack[0] / "new").stat().st_mtime_ns
    findings = list(check(stack))
    assert found(findings) == dict.fromkeys(expected, "whiteout of nothing")
    assert not any(finding.mended for finding in findings)
    assert all(finding.mended for finding in check(stack, repair=True))
    assert list(check(stack)) == []
    assert (stack[0] / "new").stat().st_mtime_ns == before
    assert os.listdir(stack[0] / "new") == [] and len(os.listdir(stack[0] / "dir")) == 1


def test_a_redirect_to_nothing_becomes_opaque(stack: list[Path], base: Path) -> None:
    make(stack, (Node(b"dir", "dir", xattrs=(("@redirect", b"/not/there"),)), Node(b"dir/own")))
    before = shown(stack, base)
    assert found(list(check(stack))) == {b"dir": "redirect to nothing"}
    assert [finding.mended for finding in check(stack, repair=True)] == [True]
    assert list(check(stack)) == []
    assert os.listxattr(stack[0] / "dir") == ["trusted.overlay.opaque"]
    assert set(shown(stack, base)) == set(before) and b"dir/kept" not in before


def test_a_redirect_that_is_no_path_is_mended(stack: list[Path]) -> None:
    make(stack, (Node(b"dir", "dir", xattrs=(("@redirect", b"a/../b"),)),))
    assert found(list(check(stack, repair=True))) == {b"dir": "redirect to nothing"}
    assert list(check(stack)) == []


def test_a_metacopy_without_data_is_told_and_left(stack: list[Path]) -> None:
    data = (("@metacopy", b""),)
    make(stack, (Node(b"big", size=10_000, xattrs=data), Node(b"lost", size=10_000, xattrs=data)))
    assert list(check(stack, repair=True)) == [Finding(stack[0], b"lost", "metacopy without data", False)]


def test_an_xattr_whiteout_that_the_kernel_overlooks_is_mended(stack: list[Path], base: Path) -> None:
    make(stack, (Node(b"dir/hidden", xattrs=(("@whiteout", b"y"),)),))
    assert b"dir/hidden" in shown(stack, base)
    assert found(list(check(stack, repair=True))) == {b"dir/hidden": "whiteout that is not seen"}
    assert list(check(stack)) == []
    assert b"dir/hidden" not in shown(stack, base)


def test_every_layer_is_looked_at_on_those_below_it(stack: list[Path], base: Path) -> None:
    make(stack, (Node(b"a", "whiteout"),), (Node(b"a"), Node(b"b", "whiteout")))
    assert [(finding.layer, finding.path) for finding in check(stack)] == [(stack[1], b"b")]


def test_work_that_was_left_is_removed_but_not_under_a_mount(stack: list[Path], base: Path) -> None:
    make(stack, (), LOWER)
    work, mnt = base / "work", base / "mnt"
    for path in (work, mnt):
        path.mkdir()
    with (
        our_mount(mnt, [stack[1]], stack[0], work),
        pytest.raises(ImageError, match="the work directory of a mount"),
    ):
        list(check_work(work))
    (work / "work" / "#left").mkdir()
    (work / "work" / "#left" / "x").write_text("")
    assert found(list(check_work(work))) == {b"work/#left": "left-over work"}
    list(check_work(work, repair=True))
    assert list(check_work(work)) == []


def test_marks_keep_their_meaning_from_style_to_style(stack: list[Path], base: Path) -> None:
    sound = tuple(node for node in SOUND if node.path != b"moved-to")
    make(stack, sound)
    before, tree = read_tree(bytes(stack[0]), since()), shown(stack, base)
    assert convert(stack[0], "aufs") == 4
    names = {path for path, _, files in os.walk(stack[0]) for path in files}
    assert names == {".wh.gone", ".wh.hidden", ".wh.moved-from", ".wh..wh..opq", "new"}
    assert list(check(stack)) == []
    (base / "ours").mkdir()
    with our_mount(base / "ours", stack):
        ours = read_tree(bytes(base / "ours"), since())
    assert compare_trees(ours, tree, ignore=("atime", "nlink", "group")) == []
    assert convert(stack[0], "kernel") == 4
    assert compare_trees(read_tree(bytes(stack[0]), since()), before, ignore=("atime", "mtime", "group", "nlink")) == []
    assert compare_trees(shown(stack, base), tree, ignore=("atime",)) == []
    assert convert(stack[0], "kernel") == 0


def test_a_layer_with_what_the_other_style_cannot_say_is_left_as_it_is(stack: list[Path]) -> None:
    make(stack, SOUND)
    before = read_tree(bytes(stack[0]), since())
    with pytest.raises(ImageError, match="moved-to has a redirect"):
        convert(stack[0], "aufs")
    assert compare_trees(read_tree(bytes(stack[0]), since()), before, ignore=("atime",)) == []


def test_a_mark_beside_a_directory_makes_it_opaque(stack: list[Path], base: Path) -> None:
    make(stack, (Node(b".wh.dir"), Node(b"dir/new")))
    convert(stack[0], "kernel")
    tree = shown(stack, base)
    assert b"dir/new" in tree and b"dir/kept" not in tree
    assert subprocess.run(["ls", "-A", stack[0]], capture_output=True, text=True).stdout == "dir\n"
