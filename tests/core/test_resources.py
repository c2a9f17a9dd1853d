"""Descriptors and memory stay bounded; what nobody refers to goes, what somebody refers to stays."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from overlayfs_py.core.requests import Caller
from tests.core.conftest import Maker
from tests.core.rig import Rig
from tests.support.trees import Node

LIMIT = 64


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """No more than LIMIT descriptors besides those this process has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + LIMIT, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


MANY = tuple(Node(b"d%03d/f%02d" % (folder, file), data=b"%d" % file) for folder in range(250) for file in range(40))


def test_ten_thousand_nodes_need_few_descriptors(make_in_memory: Maker, few_descriptors: None) -> None:
    rig = make_in_memory(MANY)
    nodes = [rig.node(node.path) for node in MANY]
    assert len(rig.fs.nodes.by_id) > 10_000
    for number in range(0, 10_000, 50):
        path, node = MANY[number].path, nodes[number]
        assert rig.call("getattr", node).size == len(MANY[number].data)
        rig.write(path, b"W")
        assert rig.read(path)[:1] == b"W"
    assert len(rig.names(b"d200")) == 40


def test_more_files_can_be_open_than_there_are_descriptors(make_in_memory: Maker, few_descriptors: None) -> None:
    rig = make_in_memory(MANY)
    files = [rig.open(node.path, os.O_RDWR if number % 2 else os.O_RDONLY) for number, node in enumerate(MANY[:300])]
    for number, file in enumerate(files):
        if number % 2:
            rig.call("write", file, 0, b"W")
        assert rig.read_file(file)[:1] == (b"W" if number % 2 else MANY[number].data[:1])
        rig.call("release", file)


def test_forgotten_nodes_go_and_so_do_their_parents(make: Maker) -> None:
    rig = make((Node(b"a/b/c/f", data=b"f"),))
    nodes = [rig.node(path) for path in (b"a", b"a/b", b"a/b/c", b"a/b/c/f")]
    for node in nodes[:3]:
        rig.forget(node)
    assert len(rig.fs.nodes.by_id) == 5
    rig.forget(nodes[3])
    assert list(rig.fs.nodes.by_id) == [1]
    assert not rig.fs.root.children


def test_a_node_is_found_again_after_it_was_forgotten(make: Maker) -> None:
    rig = make((Node(b"a/f", data=b"f"),))
    rig.write(b"a/f", b"F")
    number = rig.attr(b"a/f").ino
    rig.forget(rig.node(b"a/f"))
    assert rig.read(b"a/f") == b"F"
    assert rig.attr(b"a/f").ino == number


def test_a_forgotten_node_that_is_open_stays(make: Maker) -> None:
    rig = make((Node(b"a", data=b"data"),))
    file = rig.open(b"a")
    rig.forget(file.node)
    assert rig.fs.node(file.node.id) is file.node
    assert rig.read_file(file) == b"data"
    rig.call("release", file)


def test_an_unknown_node_id_is_stale(make: Maker) -> None:
    with pytest.raises(OSError) as raised:
        make(()).fs.node(12345)
    assert raised.value.errno == errno.ESTALE


def orphan_file(rig: Rig) -> bytes:
    rig.create(b"new", b"data")
    return b"new"


def orphan_copy(rig: Rig) -> bytes:
    rig.write(b"a", b"A")
    return b"a"


@pytest.mark.parametrize("prepare", [orphan_file, orphan_copy])
def test_a_removed_file_lives_until_it_is_forgotten_and_leaves_no_descriptor(
    make: Maker, descriptors: Callable[[], int], prepare: Callable[[Rig], bytes]
) -> None:
    rig = make((Node(b"a", data=b"data"), Node(b"b", data=b"b")))
    path = prepare(rig)
    node = rig.node(path)
    before = descriptors()
    rig.unlink(path)
    assert rig.call("getattr", node).nlink == 0
    file = rig.call("open", node, os.O_RDWR)
    rig.call("write", file, 4, b"more")
    assert rig.read_file(file)[4:] == b"more"
    rig.call("setxattr", node, b"user.k", b"v")
    assert rig.call("getxattr", node, b"user.k") == b"v"
    rig.call("release", file)
    rig.forget(node)
    assert node.id not in rig.fs.nodes.by_id
    assert descriptors() <= before


def remove_all(rig: Rig, paths: list[bytes]) -> None:
    for path in paths:
        rig.unlink(path)


def replace_all(rig: Rig, paths: list[bytes]) -> None:
    for path in paths:
        rig.create(b"other", b"other")
        rig.rename(b"other", path)


@pytest.mark.parametrize("options", [{}, {"index": False}, {"metacopy": True}])
@pytest.mark.parametrize("lose", [remove_all, replace_all])
def test_more_open_files_can_lose_their_names_than_there_are_descriptors(
    make: Maker, few_descriptors: None, lose: Callable[[Rig, list[bytes]], None], options: dict[str, Any]
) -> None:
    linked = tuple(Node(b"l%03d" % number, kind="link", data=MANY[number].path) for number in range(20))
    rig = make((*MANY[:200], *linked), **options)
    paths = [node.path for node in MANY[:200]]
    for number in range(100):
        rig.write(paths[number], b"W")
        if options.get("metacopy"):
            rig.change(paths[100 + number], mode=0o600)
    paths += [b"new%d" % number for number in range(100)]
    for path in paths[200:]:
        rig.create(path, b"new")
    shown = [rig.read(path) for path in paths]
    files = [rig.open(path) for path in paths]
    lose(rig, paths)
    for number, (file, data) in enumerate(zip(files, shown, strict=True)):
        # Without an index the names of a lower object part when it is copied up.
        left = 1 if number < 20 and options.get("index", True) else 0
        assert rig.call("getattr", file.node).nlink == left, paths[number]
        assert rig.read_file(file) == data
        rig.call("setxattr", file.node, b"user.k", b"v")
        writing = rig.call("open", file.node, os.O_RDWR)
        rig.call("write", writing, len(data), b"more")
        rig.call("release", writing)
        assert rig.read_file(file) == data + b"more"
        assert rig.call("getxattr", file.node, b"user.k") == b"v"
    assert len(os.listdir(make.layers.work / "work")) > 100
    for file in files[::2]:
        rig.call("release", file)
        rig.forget(file.node)
    for file in files[1::2]:
        assert rig.read_file(file)[-4:] == b"more"
    rig.fs.close()
    assert os.listdir(make.layers.work / "work") == []


def test_more_directories_can_be_removed_while_open_than_there_are_descriptors(
    make: Maker, few_descriptors: None
) -> None:
    rig = make(tuple(Node(b"low%d/f" % number) for number in range(50)))
    paths = [b"low%d" % number for number in range(50)]
    for path in paths:
        rig.unlink(path + b"/f")
    for number in range(50):
        paths.append(b"new%d" % number)
        rig.mkdir(paths[-1])
    nodes = [rig.node(path) for path in paths]
    for path in paths:
        rig.rmdir(path)
    for node in nodes:
        assert rig.call("getattr", node).nlink == 0
        opened = rig.call("opendir", node)
        assert rig.call("readdir", opened, 0) == []
        rig.call("releasedir", opened)
        rig.call("setxattr", node, b"user.k", b"v")
    assert len(os.listdir(make.layers.work / "work")) > 20
    for path in paths[::2]:
        rig.mkdir(path)
    for node in nodes:
        rig.forget(node)
    assert os.listdir(make.layers.work / "work") == []
    for _ in make.now_and_again(rig):
        assert rig.names() == set(paths[::2])
        assert rig.names(b"low0") == set()


def test_more_files_can_be_made_without_a_name_than_there_are_descriptors(make: Maker, few_descriptors: None) -> None:
    rig = make(())
    caller = Caller(0, 0, 1, 0)
    nodes = [rig.call("tmpfile", caller, rig.fs.root, 0o600) for _ in range(100)]
    for number, node in enumerate(nodes):
        file = rig.call("open", node, os.O_RDWR)
        rig.call("write", file, 0, b"%d" % number)
        assert rig.call("getattr", node).nlink == 0
        rig.call("release", file)
        if number % 2:
            rig.call("link", node, rig.fs.root, b"f%d" % number)
            assert rig.call("getattr", node).nlink == 1
    for node in nodes[::2]:
        rig.forget(node)
    assert os.listdir(make.layers.work / "work") == []
    for _ in make.now_and_again(rig):
        for number in range(1, 100, 2):
            assert rig.read(b"f%d" % number) == b"%d" % number
            assert rig.attr(b"f%d" % number).nlink == 1


def test_a_replaced_file_lives_until_it_is_forgotten(make: Maker, descriptors: Callable[[], int]) -> None:
    rig = make((Node(b"a", data=b"data"), Node(b"b", data=b"b")))
    file = rig.open(b"b", os.O_RDWR)
    rig.rename(b"a", b"b")
    assert rig.read_file(file) == b"b"
    assert rig.read(b"b") == b"data"
    rig.call("release", file)
    rig.forget(file.node)
    assert rig.read(b"b") == b"data"


def test_a_removed_directory_that_is_open_shows_nothing(make: Maker) -> None:
    rig = make((Node(b"d", kind="dir"),))
    rig.mkdir(b"d/new")
    opened = rig.call("opendir", rig.node(b"d"))
    rig.rmdir(b"d/new")
    rig.rmdir(b"d")
    assert rig.call("readdir", opened, 0) == []
    rig.call("releasedir", opened)


def test_a_listing_stays_while_entries_come_and_go(make: Maker) -> None:
    rig = make(tuple(Node(b"f%d" % number) for number in range(20)))
    opened = rig.call("opendir", rig.fs.root)
    first = list(rig.call("readdir", opened, 0))
    rig.unlink(b"f3")
    rig.create(b"new")
    assert rig.call("readdir", opened, 7) == first
    assert set(rig.call("readdir", opened, 0)) == {b"new", *first} - {b"f3"}
    rig.call("releasedir", opened)


def test_a_hundred_thousand_entries_are_listed(make_in_memory: Maker) -> None:
    rig = make_in_memory(())
    folder = os.open(make_in_memory.base / "lower0", os.O_PATH)
    try:
        for number in range(100_000):
            os.symlink(b"t", b"%d" % number, dir_fd=folder)
    finally:
        os.close(folder)
    assert len(rig.names()) == 100_000


def test_closing_leaves_no_descriptor(make: Maker, descriptors: Callable[[], int]) -> None:
    before = descriptors()
    rig = make(MANY[:100])
    files = [rig.open(node.path, os.O_RDWR) for node in MANY[:20]]
    for node in MANY[:10]:
        rig.unlink(node.path)
    rig.call("opendir", rig.node(b"d001"))
    rig.fs.close()
    del files
    assert descriptors() == before


def test_an_error_while_opening_leaves_no_descriptor(make: Maker, descriptors: Callable[[], int]) -> None:
    before = descriptors()
    rig = make(())
    (make.layers.work / "work/incompat").mkdir(parents=True)
    (make.layers.work / "work/incompat/volatile").mkdir()
    with pytest.raises(Exception, match="volatile"):
        make.again(rig)
    assert descriptors() == before
