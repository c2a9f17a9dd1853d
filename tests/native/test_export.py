"""File handles of the mount: they open what they were made of, whatever the kernel has forgotten, and nothing else.

The kernel's overlayfs with nfs_export=on is the oracle: what is asked of ours is asked of it.
"""

import contextlib
import ctypes
import errno
import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from overlayfs_py.engines.native import session
from overlayfs_py.sys import files, handles
from tests.conftest import Layers
from tests.filesystems import disks
from tests.native.wire import WrongAnswer, parse, served
from tests.support.caches import drop_names
from tests.support.mounts import kernel_mount, our_mount

Handle = tuple[int, bytes]
Mounted = Callable[[], contextlib.AbstractContextManager[object]]

ENTRY: Final = "QQ112x"
LOOKUP, FORGET = 1, 2
KERNEL = "index=on,nfs_export=on,redirect_dir=on"


@pytest.fixture
def tree(layers: Layers) -> Layers:
    """A lower layer with a bit of everything, and a file in the upper one."""
    (layers.lower / "d" / "e").mkdir(parents=True)
    (layers.lower / "d" / "f").write_bytes(b"of the lower layer")
    (layers.lower / "d" / "e" / "deep").write_bytes(b"deep")
    (layers.lower / "link").symlink_to("d/f")
    os.mkfifo(layers.lower / "fifo")
    (layers.upper / "d").mkdir()
    (layers.upper / "d" / "u").write_bytes(b"of the upper layer")
    return layers


@pytest.fixture(params=["kernel", "ours"])
def mounted(request: pytest.FixtureRequest, tree: Layers) -> Mounted:
    """What mounts the layers, as often as it is called."""
    if request.param == "kernel":
        return lambda: kernel_mount(tree.mnt, [tree.lower], tree.upper, tree.work, KERNEL)
    return lambda: our_mount(tree.mnt, [tree.lower], tree.upper, tree.work, "engine=native")


def handle(path: Path) -> Handle:
    return handles.file_handle(-100, os.fsencode(path))


@contextlib.contextmanager
def opened(mnt: Path, wanted: Handle, flags: int = os.O_PATH) -> Iterator[int]:
    """What a handle opens."""
    top = os.open(mnt, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd = handles.open_by_handle(top, *wanted, flags)
    finally:
        os.close(top)
    try:
        yield fd
    finally:
        os.close(fd)


def read(mnt: Path, wanted: Handle) -> bytes:
    with opened(mnt, wanted, os.O_RDONLY) as fd:
        return os.read(fd, 1000)


def error(mnt: Path, wanted: Handle) -> int | None:
    """What opening a handle fails with; None where it doesn't."""
    try:
        with opened(mnt, wanted):
            return None
    except OSError as failed:
        return failed.errno


NAMES = ("d", "d/e", "d/f", "d/e/deep", "d/u", "link", "fifo")


@pytest.mark.parametrize("caches", ["kept", "dropped", "of another mount"])
def test_a_handle_opens_what_it_was_made_of(mounted: Mounted, tree: Layers, caches: str) -> None:
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(contextlib.ExitStack())
        live.enter_context(mounted())
        made = {name: handle(tree.mnt / name) for name in NAMES}
        shown = {name: (tree.mnt / name).lstat() for name in NAMES}
        if caches == "of another mount":
            live.close()
            stack.enter_context(mounted())
        elif caches == "dropped":
            drop_names()
        for name in reversed(NAMES):
            with opened(tree.mnt, made[name]) as fd:
                found = os.fstat(fd)
            assert (found.st_ino, found.st_mode, found.st_size) == (
                shown[name].st_ino,
                shown[name].st_mode,
                shown[name].st_size,
            ), name
        assert read(tree.mnt, made["d/f"]) == b"of the lower layer"
        assert read(tree.mnt, made["d/u"]) == b"of the upper layer"
        with opened(tree.mnt, made["d/e"], os.O_RDONLY) as fd:
            assert os.listdir(fd) == ["deep"]
            assert os.readlink(f"/proc/self/fd/{fd}") == str(tree.mnt / "d" / "e")


def test_a_handle_opens_what_was_renamed_and_changed_since(mounted: Mounted, tree: Layers) -> None:
    with mounted():
        made = {name: handle(tree.mnt / name) for name in NAMES}
        (tree.mnt / "new").mkdir()
        (tree.mnt / "d" / "f").write_bytes(b"changed")
        (tree.mnt / "d" / "f").rename(tree.mnt / "new" / "g")
        (tree.mnt / "d" / "u").rename(tree.mnt / "new" / "v")
        (tree.mnt / "d" / "e").rename(tree.mnt / "new" / "moved")
        drop_names()
        assert read(tree.mnt, made["d/f"]) == b"changed"
        assert read(tree.mnt, made["d/u"]) == b"of the upper layer"
        assert read(tree.mnt, made["d/e/deep"]) == b"deep"
        with opened(tree.mnt, made["d/e"]) as fd:
            assert os.readlink(f"/proc/self/fd/{fd}") == str(tree.mnt / "new" / "moved")


def test_what_a_handle_opens_is_copied_up_by_a_write(mounted: Mounted, tree: Layers) -> None:
    with mounted():
        deep = handle(tree.mnt / "d" / "e" / "deep")
        drop_names()
        with opened(tree.mnt, deep, os.O_WRONLY) as fd:
            os.write(fd, b"DEEP")
        assert (tree.mnt / "d" / "e" / "deep").read_bytes() == b"DEEP"
        assert (tree.lower / "d" / "e" / "deep").read_bytes() == b"deep"


@pytest.mark.parametrize("name", ["d/f", "d/u", "d/e/deep", "link", "d/e"])
def test_the_handle_of_what_was_removed_is_stale(mounted: Mounted, tree: Layers, name: str) -> None:
    with mounted():
        gone = handle(tree.mnt / name)
        if name == "d/e":
            (tree.mnt / "d" / "e" / "deep").unlink()
            (tree.mnt / name).rmdir()
        else:
            (tree.mnt / name).unlink()
        assert error(tree.mnt, gone) == errno.ESTALE
        drop_names()
        assert error(tree.mnt, gone) == errno.ESTALE
    with mounted():
        assert error(tree.mnt, gone) == errno.ESTALE


def test_a_handle_never_opens_what_has_got_its_inode_number_since(mounted: Mounted, tree: Layers) -> None:
    """Where numbers are given anew, as in ext4; another process may get one, so it is tried several times."""
    gone = []
    with mounted():
        for attempt in range(8):
            (tree.mnt / "one").write_bytes(b"one")
            gone.append(handle(tree.mnt / "one"))
            (tree.mnt / "one").unlink()
            for serial in range(10):
                (tree.mnt / f"two{attempt}.{serial}").write_bytes(b"two")
        assert {error(tree.mnt, one) for one in gone} == {errno.ESTALE}
        drop_names()
        assert {error(tree.mnt, one) for one in gone} == {errno.ESTALE}
    with mounted():
        assert {error(tree.mnt, one) for one in gone} == {errno.ESTALE}


def test_a_handle_stays_that_of_a_file_that_is_copied_up(mounted: Mounted, tree: Layers) -> None:
    with mounted():
        before = handle(tree.mnt / "d" / "f")
        (tree.mnt / "d" / "f").write_bytes(b"changed")
        assert handle(tree.mnt / "d" / "f") == before
        drop_names()
        assert handle(tree.mnt / "d" / "f") == before
    with mounted():
        assert handle(tree.mnt / "d" / "f") == before


def test_handles_open_again_over_each_transport_while_others_ask(tree: Layers, uring: str) -> None:
    for number in range(200):
        (tree.lower / "d" / f"n{number}").write_bytes(b"%d" % number)
    with our_mount(tree.mnt, [tree.lower], tree.upper, tree.work, f"engine=native,uring={uring}"):
        made = [handle(tree.mnt / "d" / f"n{number}") for number in range(200)]
        drop_names()
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda one: read(tree.mnt, one), made)
            walks = [pool.submit(lambda: len(list(tree.mnt.rglob("*")))) for _ in range(8)]
            assert list(found) == [b"%d" % number for number in range(200)]
            assert {walk.result() for walk in walks} == {200 + len(NAMES)}


def test_handles_of_a_mount_without_an_upper_layer_open_again(tree: Layers) -> None:
    for _ in range(2):
        with our_mount(tree.mnt, [tree.upper, tree.lower], options="engine=native"):
            made = {name: handle(tree.mnt / name) for name in NAMES}
    with our_mount(tree.mnt, [tree.upper, tree.lower], options="engine=native"):
        assert read(tree.mnt, made["d/u"]) == b"of the upper layer"
        assert read(tree.mnt, made["d/e/deep"]) == b"deep"


def test_a_lower_directory_renamed_in_a_lower_layer_is_found(tree: Layers) -> None:
    """The upper layer of one mount becomes a lower layer of the next."""
    with our_mount(tree.mnt, [tree.lower], tree.upper, tree.work, "engine=native"):
        (tree.mnt / "d").rename(tree.mnt / "c")
        (tree.mnt / "c" / "e").rename(tree.mnt / "c" / "g")
    top, work = tree.add("top"), tree.add("work2")
    with our_mount(tree.mnt, [tree.upper, tree.lower], top, work, "engine=native"):
        (tree.mnt / "c").rename(tree.mnt / "b")
        deep = handle(tree.mnt / "b" / "g" / "deep")
        drop_names()
        assert read(tree.mnt, deep) == b"deep"
        drop_names()
        assert (tree.mnt / "b" / "g" / "deep").stat().st_ino == (tree.lower / "d" / "e" / "deep").stat().st_ino


def test_hard_links_with_an_index_are_one_object_by_handle(mounted: Mounted, tree: Layers) -> None:
    os.link(tree.lower / "d" / "f", tree.lower / "f2")
    with mounted():
        made = handle(tree.mnt / "d" / "f")
        (tree.mnt / "f2").write_bytes(b"changed")
        drop_names()
        assert read(tree.mnt, made) == b"changed"


def test_hard_links_that_part_on_copy_up_are_not_opened_for_one_another(tree: Layers) -> None:
    os.link(tree.lower / "d" / "f", tree.lower / "f2")
    with our_mount(tree.mnt, [tree.lower], tree.upper, tree.work, "engine=native,index=off"):
        first, other = handle(tree.mnt / "d" / "f"), handle(tree.mnt / "f2")
        (tree.mnt / "f2").write_bytes(b"changed")
        drop_names()
        for wanted, content in ((first, b"of the lower layer"), (other, b"changed")):
            # The kernel forgets when it likes: until then a handle opens its own file, and afterwards none.
            try:
                assert read(tree.mnt, wanted) == content
            except OSError as failed:
                assert failed.errno == errno.ESTALE
    with our_mount(tree.mnt, [tree.lower], tree.upper, tree.work, "engine=native,index=off"):
        assert error(tree.mnt, other) == errno.ESTALE


@pytest.mark.parametrize("kind", disks.WRITABLE)
@pytest.mark.parametrize("lower", ["beside the upper", "elsewhere"])
def test_handles_open_again_on_layers_of_any_filesystem(tree: Layers, kind: str, lower: str) -> None:
    with disks.writable(kind, tree.base) as point:
        upper, work = point / "upper", point / "work"
        upper.mkdir()
        work.mkdir()
        below = tree.lower
        if lower == "beside the upper":
            below = point / "lower"
            subprocess.run(["cp", "-a", tree.lower, below], check=True, timeout=60)
        (upper / "u").write_bytes(b"of the upper layer")
        gone = []
        for _ in range(2):
            with our_mount(tree.mnt, [below], upper, work, "engine=native"):
                made = {name: handle(tree.mnt / name) for name in ("u", "d/f", "d/e", "link")}
                (tree.mnt / "d" / "e" / "deep").write_bytes(b"deeper")
                (tree.mnt / "one").touch()
                gone.append(handle(tree.mnt / "one"))
                (tree.mnt / "one").unlink()
                (tree.mnt / "other").touch()
                drop_names()
                assert read(tree.mnt, made["d/f"]) == b"of the lower layer"
                assert read(tree.mnt, made["u"]) == b"of the upper layer"
                with opened(tree.mnt, made["d/e"], os.O_RDONLY) as fd:
                    assert os.listdir(fd) == ["deep"]
                assert {error(tree.mnt, one) for one in gone} == {errno.ESTALE}
        with our_mount(tree.mnt, [below], upper, work, "engine=native"):
            assert {error(tree.mnt, one) for one in gone} == {errno.ESTALE}
            for name, one in made.items():
                with opened(tree.mnt, one) as fd:
                    assert os.fstat(fd).st_ino == (tree.mnt / name).lstat().st_ino


@pytest.mark.parametrize("name", ["d/u", "d/f"])
def test_a_mount_as_a_lower_layer_of_another_keeps_inode_numbers(tree: Layers, name: str) -> None:
    """The number of a file that is copied up is read out of its handle in the layer below."""
    inner, upper, work = tree.add("inner"), tree.add("upper2"), tree.add("work2")
    with our_mount(inner, [tree.lower], tree.upper, tree.work, "engine=native"):
        with our_mount(tree.mnt, [inner], upper, work, "engine=native"):
            before, made = (tree.mnt / name).stat().st_ino, handle(tree.mnt / name)
            (tree.mnt / name).write_bytes(b"changed")
            assert (tree.mnt / name).stat().st_ino == before
        with our_mount(tree.mnt, [inner], upper, work, "engine=native"):
            assert (tree.mnt / name).stat().st_ino == before
            drop_names()
            assert read(tree.mnt, made) == b"changed"


@pytest.mark.parametrize("kernels", [True, False])
def test_without_export_no_handle_is_given(tree: Layers, kernels: bool) -> None:
    mounting = kernel_mount if kernels else our_mount
    with mounting(tree.mnt, [tree.lower], tree.upper, tree.work, "nfs_export=off"):
        libc = ctypes.CDLL(None, use_errno=True)
        room = (ctypes.c_uint * 34)(128)
        assert libc.name_to_handle_at(-100, bytes(tree.mnt / "d"), room, (ctypes.c_int * 1)(), 0) == -1
        assert ctypes.get_errno() == errno.EOPNOTSUPP


def test_an_open_file_without_a_name_is_opened_by_handle(tree: Layers) -> None:
    with our_mount(tree.mnt, [tree.lower], tree.upper, tree.work, "engine=native"):
        fd = os.open(tree.mnt, os.O_TMPFILE | os.O_RDWR, 0o600)
        try:
            os.write(fd, b"nameless")
            made = handles.file_handle(fd, b"")
            drop_names()
            assert read(tree.mnt, made) == b"nameless"
        finally:
            os.close(fd)
        drop_names()
        assert error(tree.mnt, made) == errno.ESTALE


def test_the_requests_of_opening_by_handle(tree: Layers) -> None:
    with served(tree.base) as client:
        d = client.look_up(b"d")
        f = client.ask(LOOKUP, d, b"f\0").unpack(ENTRY)
        u = client.ask(LOOKUP, d, b"u\0").unpack(ENTRY)
        assert f[1] == 0 and u[1] != 0, "generations"
        assert client.ask(LOOKUP, f[0], b".\0").unpack(ENTRY) == f
        assert client.ask(LOOKUP, f[0], b"..\0").unpack(ENTRY)[0] == d
        assert client.ask(LOOKUP, d, b"..\0").unpack(ENTRY) == (1, 0)
        assert client.ask(LOOKUP, 1, b"..\0").unpack(ENTRY) == (1, 0)
        for node, generation in (f, u):
            client.tell(FORGET, node, (2).to_bytes(8, "little"))
            assert client.ask(3, node, bytes(16)).error == errno.ESTALE
            assert client.ask(LOOKUP, node, b"..\0").error == errno.ESTALE
            assert client.ask(LOOKUP, node, b".\0").unpack(ENTRY) == (node, generation)
        for unknown in (0, 2, 12345678, 1 << 63, (1 << 64) - 1):
            assert client.ask(LOOKUP, unknown, b".\0").error == errno.ESTALE
        client.serves()
    with served(tree.base, nfs_export=False) as client:
        assert client.ask(LOOKUP, 1, b".\0").error == errno.EINVAL
        assert client.ask(LOOKUP, 1, b"..\0").error == errno.EINVAL
        assert client.ask(LOOKUP, client.look_up(b"d"), b"u\0").unpack(ENTRY)[1] == 0


def test_who_is_killed_does_not_wait_for_the_end_of_a_search(tree: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []

    def list_dir(_fd: int) -> list[tuple[bytes, int, int]]:
        # A layer of very many directories, on a slow disk: this one, over and over.
        time.sleep(0.01)
        return [(b".", 1, stat.S_IFDIR >> 12)]

    with served(tree.base) as client, monkeypatch.context() as patched:
        client.serves()
        patched.setattr(files, "list_dir", list_dir)
        patched.setattr(session, "dying", killed.__contains__)
        client.send(client.pack(LOOKUP, 12345678, b".\0"))
        with pytest.raises(WrongAnswer):
            client.receive(0.5)
        # That of every request over a wire.
        killed.append(1)
        assert parse(client.receive(5), client.unique).error == errno.EINTR


def test_without_handles_the_kernels_overlayfs_keeps_what_it_copied_up_from_such_a_layer(layers: Layers) -> None:
    (layers.lower / "file").write_bytes(b"below")
    below = layers.add("below")
    with (
        our_mount(below, [layers.lower], options="engine=native,nfs_export=off"),
        kernel_mount(layers.mnt, [below], layers.upper, layers.work, "index=on"),
    ):
        (layers.mnt / "file").write_bytes(b"changed")
        for _ in range(3):
            drop_names()
            assert (layers.mnt / "file").read_bytes() == b"changed"
            assert (layers.mnt / "file").stat().st_nlink == 1
