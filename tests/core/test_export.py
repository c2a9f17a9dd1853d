"""Objects found by their node ids alone, once they are forgotten; a search without result leaves nothing behind."""

import errno

import pytest

from overlayfs_py.core.ops import OPERATIONS
from tests.core.conftest import Maker
from tests.core.rig import Rig
from tests.support.trees import Node

TOP = (Node(b"d/upper", data=b"of the upper lower layer"), Node(b"gone", kind="whiteout"), Node(b"hidden", data=b"x"))
BOTTOM = (
    Node(b"d/lower", data=b"of the lower"),
    Node(b"d/e/deep", data=b"deep"),
    Node(b"gone", data=b"gone"),
    Node(b"hidden/below", data=b"below"),
    Node(b"link", kind="symlink", data=b"d"),
    Node(b"sole", data=b"sole"),
)
PATHS = (b"d", b"d/upper", b"d/lower", b"d/e", b"d/e/deep", b"hidden", b"link", b"sole")


def stale(rig: Rig, node_id: int) -> None:
    with pytest.raises(OSError) as caught:
        rig.call("lookup_id", node_id)
    assert caught.value.errno == errno.ESTALE


@pytest.mark.parametrize("path", PATHS)
def test_an_object_is_found_by_its_id_in_another_mount(make: Maker, path: bytes) -> None:
    rig = make(TOP, BOTTOM)
    node_id = rig.node(path).id
    rig = make.again(rig)
    found = rig.call("lookup_id", node_id)
    assert found is rig.node(path)
    assert rig.call("lookup_id", node_id) is found
    assert rig.call("lookup_parent", node_id) is rig.node(path.rpartition(b"/")[0])


def test_an_object_is_found_wherever_changes_have_taken_it(make: Maker) -> None:
    rig = make(TOP, BOTTOM)
    ids = {path: rig.node(path).id for path in PATHS}
    rig.write(b"d/lower", b"OF")
    rig.rename(b"sole", b"d/e/renamed")
    rig.rename(b"d", b"moved")
    rig.rename(b"moved/e", b"e")
    rig = make.again(rig)
    wanted = (b"moved", b"moved/upper", b"moved/lower", b"e", b"e/deep", b"hidden", b"link", b"e/renamed")
    for path, now in zip(PATHS, wanted, strict=True):
        assert rig.call("lookup_id", ids[path]) is rig.node(now), path


def test_a_search_without_result_leaves_no_node_behind(make: Maker) -> None:
    rig = make(TOP, BOTTOM)
    ids = [rig.node(path).id for path in (b"d/lower", b"d/e/deep", b"sole")]
    hidden = [(make.base / "lower1" / name).stat().st_ino for name in ("gone", "hidden", "hidden/below")]
    for path in (b"d/lower", b"d/e/deep", b"sole"):
        rig.unlink(path)
    rig = make.again(rig)
    known = set(rig.fs.nodes.by_id)
    for node_id in (*ids, *hidden, 2, 12345678, 1 << 63, (1 << 64) - 1):
        stale(rig, node_id)
        assert set(rig.fs.nodes.by_id) == known


def test_an_object_that_is_removed_while_it_is_open_is_not_found(make: Maker) -> None:
    rig = make(TOP, BOTTOM)
    node = rig.node(b"sole")
    with rig.opened(b"sole"):
        rig.unlink(b"sole")
        stale(rig, node.id)
        with pytest.raises(OSError, match="tale"):
            rig.call("lookup_parent", node.id)


@pytest.mark.parametrize("moved", [False, True])
def test_a_search_that_nobody_waits_for_any_more_ends(make: Maker, moved: bool) -> None:
    rig = make(TOP, BOTTOM)
    node_id = rig.node(b"sole").id
    if moved:
        rig.rename(b"sole", b"d/moved")
    rig = make.again(rig)
    known = set(rig.fs.nodes.by_id)
    steps = OPERATIONS["lookup_id"](rig.fs, node_id)
    if moved:
        # By its number alone it is found where it was, which a second job then goes on from.
        next(steps).execute()
    job = next(steps)
    asked: list[None] = []

    def unwanted() -> bool:
        asked.append(None)
        return len(asked) > 2

    job.unwanted = unwanted
    job.execute()
    with pytest.raises(InterruptedError):
        next(steps)
    assert len(asked) == 3
    assert set(rig.fs.nodes.by_id) == known
    assert rig.call("lookup_id", node_id) is rig.node(b"d/moved" if moved else b"sole")


def test_names_of_a_lower_file_that_part_are_not_found(make: Maker) -> None:
    linked = (Node(b"a", data=b"linked"), Node(b"b", kind="link", data=b"a"))
    rig = make(linked, index=False)
    first, second = rig.node(b"a").id, rig.node(b"b").id
    assert first != second
    rig = make.again(rig)
    known = set(rig.fs.nodes.by_id)
    stale(rig, first)
    stale(rig, second)
    assert set(rig.fs.nodes.by_id) == known
    rig = make.again(rig, index=None)
    assert rig.call("lookup_id", first) is rig.node(b"a") is rig.node(b"b")


def test_a_path_remembered_from_the_last_search_is_only_a_guess(make: Maker) -> None:
    rig = make(TOP, BOTTOM)
    node_id = rig.node(b"sole").id
    rig = make.again(rig)
    found = rig.call("lookup_id", node_id)
    found.lookups += 1
    rig.forget(found)
    rig.rename(b"sole", b"other")
    rig.create(b"sole", b"another")
    rig.forget(rig.node(b"other"))
    assert rig.read(b"other") == b"sole"
    rig.forget(rig.node(b"other"))
    assert rig.call("lookup_id", node_id) is rig.node(b"other")
