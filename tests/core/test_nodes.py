"""Nodes know every name that leads to them."""

import stat

from overlayfs_py.core.nodes import Node


def directory(name: bytes) -> Node:
    return Node(stat.S_IFDIR, None, name, None, ())


def test_a_node_with_two_names_is_not_removed_with_its_first_one() -> None:
    one, other = directory(b"one"), directory(b"other")
    node = Node(stat.S_IFREG, one, b"first", None, ())
    node.add_name(one, b"first")
    node.add_name(other, b"second")
    assert node.names() == [(one, b"first"), (other, b"second")]
    assert node.has_other_name(one, b"first")

    node.drop_name(one, b"first")
    assert node.names() == [(other, b"second")]
    assert (node.parent, node.name) == (other, b"second")
    assert not node.has_other_name(other, b"second")
    assert one.children == {}

    node.drop_name(other, b"second")
    assert node.removed
    assert node.names() == []


def test_adding_a_name_twice_adds_it_once() -> None:
    parent = directory(b"parent")
    node = Node(stat.S_IFREG, parent, b"first", None, ())
    for name in (b"first", b"second", b"second", b"first"):
        node.add_name(parent, name)
    assert node.names() == [(parent, b"first"), (parent, b"second")]


def test_a_removed_node_that_gets_a_name_again_is_no_longer_removed() -> None:
    parent = directory(b"parent")
    node = Node(stat.S_IFREG, parent, b"old", None, ())
    node.drop_name(parent, b"old")
    node.add_name(parent, b"new")
    assert not node.removed
    assert node.names() == [(parent, b"new")]


def test_any_of_65_000_names_goes_in_a_moment() -> None:
    parent = directory(b"parent")
    node = Node(stat.S_IFREG, parent, b"0", None, ())
    names = [b"%d" % number for number in range(65_000)]
    for name in names:
        node.add_name(parent, name)
    for name in names:
        assert node.has_other_name(parent, name) == (name != names[-1])
        node.drop_name(parent, name)
    assert node.removed
