"""Hard links stay hard links across copy-up and remount, with the right counts."""

import os
from pathlib import Path

import pytest

from tests.core.conftest import Maker
from tests.core.rig import Rig, differences
from tests.support.trees import Node

LINKED = (
    Node(b"a", data=b"linked data"),
    Node(b"b", kind="link", data=b"a"),
    Node(b"d/c", kind="link", data=b"a"),
    Node(b"single", data=b"s"),
)
NAMES = (b"a", b"b", b"d/c")


def group(rig: Rig, *paths: bytes) -> tuple[int, set[int]]:
    """How many different nodes these are, and their link counts."""
    return len({rig.node(path) for path in paths}), {rig.attr(path).nlink for path in paths}


def index(rig: Rig) -> list[str]:
    work = rig.fs.config.workdir
    assert work is not None
    return os.listdir(os.fsdecode(work) + "/index")


def test_names_of_a_lower_object_are_one_node(make: Maker) -> None:
    assert group(make(LINKED), *NAMES) == (1, {3})


@pytest.mark.parametrize("metacopy", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_copied_up_object_keeps_all_its_names(make: Maker, name: bytes, metacopy: bool) -> None:
    rig = make(LINKED, metacopy=metacopy)
    rig.change(name, mode=0o600)
    rig.write(name, b"LINKED")
    for _ in make.now_and_again(rig):
        assert group(rig, *NAMES) == (1, {3})
        assert {rig.read(path) for path in NAMES} == {b"LINKED data"}
        assert {rig.attr(path).mode & 0o777 for path in NAMES} == {0o600}


def test_a_name_that_was_not_looked_up_before_the_copy_leads_to_it(make: Maker) -> None:
    rig = make(LINKED)
    rig.write(b"a", b"LINKED")
    assert rig.read(b"d/c") == b"LINKED data"
    assert rig.node(b"d/c") is rig.node(b"a")


def test_each_name_that_goes_is_counted(make: Maker) -> None:
    rig = make(LINKED)
    rig.unlink(b"b")
    assert group(rig, b"a", b"d/c") == (1, {2})
    rig = make.again(rig)
    assert group(rig, b"a", b"d/c") == (1, {2})
    rig.unlink(b"a")
    assert group(rig, b"d/c") == (1, {1})
    rig = make.again(rig)
    assert group(rig, b"d/c") == (1, {1})
    assert rig.read(b"d/c") == b"linked data"
    assert len(index(rig)) == 1
    rig.unlink(b"d/c")
    assert index(rig) == []
    assert rig.names(b"d") == set()
    assert make.again(rig).names() == {b"d", b"single"}


def test_a_new_name_of_a_linked_object_is_counted(make: Maker) -> None:
    rig = make(LINKED)
    rig.link(b"a", b"d/new")
    for _ in make.now_and_again(rig):
        assert group(rig, *NAMES, b"d/new") == (1, {4})
    rig.write(b"b", b"LINKED")
    assert rig.read(b"d/new") == b"LINKED data"


def test_a_renamed_name_stays_one_of_the_object(make: Maker) -> None:
    rig = make(LINKED)
    rig.rename(b"b", b"d/moved")
    for _ in make.now_and_again(rig):
        assert group(rig, b"a", b"d/c", b"d/moved") == (1, {3})
        assert not rig.exists(b"b")


def test_renaming_one_name_over_another_of_the_same_object_does_nothing(make: Maker) -> None:
    rig = make(LINKED)
    before = rig.tree()
    rig.rename(b"a", b"b")
    assert not differences(before, rig.tree())


def test_a_name_renamed_over_is_no_longer_counted(make: Maker) -> None:
    rig = make(LINKED)
    rig.rename(b"single", b"b")
    for _ in make.now_and_again(rig):
        assert group(rig, b"a", b"d/c") == (1, {2})
        assert rig.read(b"b") == b"s"


def test_links_made_in_the_upper_layer_count_without_the_index(make: Maker) -> None:
    rig = make(LINKED)
    rig.create(b"new", b"new")
    rig.link(b"new", b"d/new")
    for _ in make.now_and_again(rig):
        assert group(rig, b"new", b"d/new") == (1, {2})
    rig.unlink(b"new")
    assert group(rig, b"d/new") == (1, {1})
    assert index(rig) == []


def test_a_single_object_that_is_linked_is_no_matter_of_the_index(make: Maker) -> None:
    rig = make(LINKED)
    rig.link(b"single", b"twin")
    for _ in make.now_and_again(rig):
        assert group(rig, b"single", b"twin") == (1, {2})
    assert index(rig) == []


def test_without_an_index_a_copy_is_an_object_of_its_own(make: Maker) -> None:
    rig = make(LINKED, index=False)
    rig.write(b"a", b"LINKED")
    for _ in make.now_and_again(rig):
        assert rig.read(b"a") == b"LINKED data"
        assert rig.read(b"b") == b"linked data"
        assert rig.attr(b"a").nlink == 1
        assert rig.attr(b"a").ino != rig.attr(b"b").ino


def test_links_of_several_layers_are_several_objects(make: Maker) -> None:
    rig = make((Node(b"a", data=b"top"), Node(b"top", kind="link", data=b"a")), LINKED)
    assert group(rig, b"a", b"top") == (1, {2})
    rig.write(b"b", b"LINKED")
    for _ in make.now_and_again(rig):
        assert rig.read(b"a") == b"top"
        assert rig.read(b"d/c") == b"LINKED data"
        assert rig.node(b"a") is not rig.node(b"b")


def test_an_open_object_whose_names_are_all_gone_lives_on(make: Maker) -> None:
    rig = make(LINKED)
    with rig.opened(b"a", os.O_RDWR) as file:
        for name in NAMES:
            rig.unlink(name)
        assert rig.call("getattr", file.node).nlink == 0
        rig.call("write", file, 0, b"LINKED")
        assert rig.read_file(file) == b"LINKED data"
    assert index(rig) == []


def test_a_removed_linked_object_leaves_the_lower_layer_alone(make: Maker) -> None:
    rig = make(LINKED)
    for name in NAMES:
        rig.unlink(name)
    assert rig.names() == {b"d", b"single"}
    assert os.stat(make.base / "lower0/a").st_nlink == 3
    assert Path(make.base / "lower0/a").read_bytes() == b"linked data"


def test_symbolic_links_and_devices_can_be_linked_too(make: Maker) -> None:
    special = (
        Node(b"sym", kind="symlink", data=b"t"),
        Node(b"sym2", kind="link", data=b"sym"),
        Node(b"fifo", kind="fifo"),
        Node(b"fifo2", kind="link", data=b"fifo"),
    )
    rig = make(special)
    rig.change(b"sym", uid=5)
    rig.change(b"fifo", mode=0o600)
    for _ in make.now_and_again(rig):
        assert group(rig, b"sym", b"sym2") == (1, {2})
        assert group(rig, b"fifo", b"fifo2") == (1, {2})
        assert rig.attr(b"sym2").uid == 5
        assert rig.attr(b"fifo2").mode & 0o777 == 0o600


def test_what_lost_one_name_gets_another_while_one_is_left_that_nobody_looked_up(make: Maker) -> None:
    rig = make((Node(b"d/below"),), upper=(Node(b"a", data=b"data"), Node(b"b", kind="link", data=b"a")))
    with rig.opened(b"a") as file:
        rig.unlink(b"a")
        rig.call("link", file.node, *rig.place(b"d/new"))
    assert rig.read(b"d/new") == rig.read(b"b") == b"data"
    assert group(rig, b"d/new", b"b") == (1, {2})
