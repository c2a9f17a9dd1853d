"""The store: names, IDs, shared layers, what goes when, and what is left after a kill."""

import os
import random
import subprocess
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from overlayfs_py.images import Image, ImageError, Store
from overlayfs_py.images.load import load
from overlayfs_py.images.reference import parse
from tests.images.rig import Item, archive, folder, load_one, our_tree, write_layout

BASE = archive([folder("./"), *(Item(f"file-{serial}", b"x" * serial) for serial in range(60))])


def add(store: Store, base: Path, name: str, *tops: Sequence[Item]) -> Image:
    """An image of BASE and more layers, named `name`:latest."""
    write_layout(base / name, [BASE, *(archive(items) for items in tops)], Labels={"name": name})
    return load_one(store, base / name)


def layer_count(store: Store) -> int:
    return len(os.listdir(store.layout.layers))


def unused(_image_id: str) -> list[str]:
    return []


@pytest.mark.parametrize(
    ("text", "full", "short"),
    [
        ("debian", "docker.io/library/debian:latest", "debian:latest"),
        ("debian:12", "docker.io/library/debian:12", "debian:12"),
        ("someone/thing", "docker.io/someone/thing:latest", "someone/thing:latest"),
        ("docker.io/debian", "docker.io/library/debian:latest", "debian:latest"),
        ("localhost/a:b", "localhost/a:b", "localhost/a:b"),
        ("localhost:5000/a", "localhost:5000/a:latest", "localhost:5000/a:latest"),
        ("host.example/a/b/c:1", "host.example/a/b/c:1", "host.example/a/b/c:1"),
        ("[::1]:5000/a", "[::1]:5000/a:latest", "[::1]:5000/a:latest"),
        (f"a@sha256:{'0' * 64}", f"docker.io/library/a@sha256:{'0' * 64}", f"a@sha256:{'0' * 64}"),
    ],
)
def test_names_are_read_as_docker_reads_them(text: str, full: str, short: str) -> None:
    assert (parse(text).full, parse(text).short) == (full, short)


@pytest.mark.parametrize(
    "text", ["", "UPPER", "a b", "a:", "a:b c", "/a", "a//b", "a@sha256:12", "a@md5:1", "-a", "a:" + "t" * 129, "../a"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ImageError):
        parse(text)


def test_an_image_is_found_by_name_and_by_the_beginning_of_its_id(store: Store, base: Path) -> None:
    image = add(store, base, "one")
    assert image.names == ("one:latest",)
    digits = image.id.removeprefix("sha256:")
    for text in ("one", "one:latest", "docker.io/library/one:latest", image.id, digits, digits[:12], digits[:1]):
        assert store.image(text) == image
    for text in ("two", "one:1", "sha256:" + "f" * 64, ""):
        with pytest.raises(ImageError):
            store.image(text)


def test_an_id_that_several_begin_with_is_refused(store: Store, base: Path) -> None:
    # Of seventeen images two begin alike.
    images = [add(store, base, f"image-{serial}") for serial in range(17)]
    first = [image.short_id[0] for image in images]
    shared = next(digit for digit in first if first.count(digit) > 1)
    with pytest.raises(ImageError, match="the beginning of"):
        store.image(shared)


def test_images_share_the_layers_they_have_in_common(store: Store, base: Path) -> None:
    one, two = add(store, base, "one", [Item("a", b"1")]), add(store, base, "two", [Item("a", b"2")])
    assert one.layers[0] == two.layers[0]
    assert layer_count(store) == 3
    store.remove(one, in_use=unused)
    assert layer_count(store) == 2
    assert our_tree(two, base / "mnt")[b"file-7"].size == 7
    store.remove(two, in_use=unused)
    assert layer_count(store) == 0
    assert os.listdir(store.layout.blobs) == [] and os.listdir(store.layout.tmp) == []


def test_the_same_content_on_another_layer_is_another_layer(store: Store, base: Path) -> None:
    one = add(store, base, "one", [Item("a", b"1")], [Item("b", b"1")])
    two = add(store, base, "two", [Item("b", b"1")])
    assert one.layers[2].diff_id == two.layers[1].diff_id
    assert one.layers[2].chain_id != two.layers[1].chain_id


def test_an_image_in_use_stays_and_loses_only_its_names_by_force(store: Store, base: Path) -> None:
    image = add(store, base, "one")
    with pytest.raises(ImageError, match="used by web, db"):
        store.remove(image, in_use=lambda _: ["web", "db"])
    assert store.image("one") == image
    assert not store.remove(image, in_use=lambda _: ["web"], force=True)
    kept = store.image(image.id)
    assert kept.names == () and kept.layers[0].path.is_dir()


def test_a_tag_moves_from_image_to_image(store: Store, base: Path) -> None:
    one, two = add(store, base, "one"), add(store, base, "two")
    store.tag(one, "shared:1")
    store.tag(one, "shared:1")
    assert set(store.image(one.id).names) == {"one:latest", "shared:1"}
    store.tag(two, "shared:1")
    assert store.image("shared:1").id == two.id
    assert store.image(one.id).names == ("one:latest",)
    assert store.untag("two").names == ("shared:1",)


def test_loading_again_changes_nothing(store: Store, base: Path) -> None:
    image = add(store, base, "one")
    inode = image.layers[0].path.stat().st_ino
    assert load_one(store, base / "one") == image
    assert image.layers[0].path.stat().st_ino == inode
    assert store.images() == [image]


def test_a_store_that_names_its_images_by_itself_is_an_oci_layout(store: Store, base: Path) -> None:
    image = add(store, base, "one", [Item("a", b"1")])
    source = f"oci:{store.root}:docker.io/library/one:latest"
    subprocess.run(["skopeo", "copy", "--quiet", source, f"oci:{base / 'copy'}:x"], check=True, timeout=60)
    other = Store.open(base / "other")
    assert load_one(other, base / "copy").id == image.id


def run_loads(store: Store, *sources: Path) -> list[ForkProcess]:
    """Processes that load an image each."""
    processes = [get_context("fork").Process(target=load_one, args=(store, source)) for source in sources]
    for process in processes:
        process.start()
    return processes


def test_one_image_loaded_by_many_at_once_is_there_once(store: Store, base: Path) -> None:
    write_layout(base / "one", [BASE, archive([Item("a", b"1")])])
    for process in run_loads(store, *[base / "one"] * 4):
        process.join(60)
        assert process.exitcode == 0
    (image,) = store.images()
    assert len(our_tree(image, base / "mnt")) == 62
    assert layer_count(store) == 2 and os.listdir(store.layout.tmp) == []


def test_loading_and_removing_at_once_leaves_whole_images(store: Store, base: Path) -> None:
    for name in ("one", "two"):
        write_layout(base / name, [BASE, archive([Item(name, b"1")])])
    loads = run_loads(store, *[base / "one", base / "two"] * 2)
    while any(process.is_alive() for process in loads):
        for image in store.images():
            store.remove(image, in_use=unused)
    assert [process.exitcode for process in loads] == [0] * 4
    for image in [load_one(store, base / "one"), *store.images()]:
        assert len(our_tree(image, base / "mnt")) == 62
    assert os.listdir(store.layout.tmp) == []


def test_images_are_listed_while_they_come_and_go(store: Store, base: Path) -> None:
    for name in ("one", "two"):
        write_layout(base / name, [BASE], Labels={"name": name})

    def come_and_go() -> None:
        for _ in range(8):
            store.remove(load_one(store, base / "one"), in_use=unused)

    process = get_context("fork").Process(target=come_and_go)
    process.start()
    while process.is_alive():
        assert len(store.images()) < 2
    assert process.exitcode == 0


def test_an_image_stays_while_the_store_is_held(store: Store, base: Path) -> None:
    image = add(store, base, "one")
    process = get_context("fork").Process(target=store.remove, args=(image,), kwargs={"in_use": unused})
    with store.locked(exclusive=False):
        process.start()
        process.join(0.3)
        assert process.is_alive() and store.image("one") == image
    process.join(30)
    assert process.exitcode == 0 and store.images() == []


def test_a_load_that_is_killed_leaves_a_store_that_works(store: Store, base: Path) -> None:
    kept = add(store, base, "kept")
    noise = random.Random(1)
    big = archive([Item(f"big-{serial}", noise.randbytes(2000)) for serial in range(1000)])
    write_layout(base / "big", [BASE, big])
    for delay in (0.02, 0.1, 0.2, 0.4):
        (process,) = run_loads(store, base / "big")
        time.sleep(delay)
        process.kill()
        process.join()
        assert kept in Store.open(store.root).images()
        for image in store.images():
            assert all(layer.path.is_dir() for layer in image.layers)
    image = load_one(store, base / "big")
    assert len(our_tree(image, base / "mnt")) == 1061
    store.remove(image, in_use=unused)
    assert os.listdir(store.layout.tmp) == []
    assert layer_count(store) == 1 and len(os.listdir(store.layout.blobs)) == 3


def test_a_full_disk_is_one_line_and_leaves_nothing(base: Path) -> None:
    small = base / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", small], check=True)
    try:
        store = Store.open(small / "store")
        image = add(store, base, "one")
        write_layout(base / "big", [archive([Item("big", bytes(8 << 20))])])
        with pytest.raises(ImageError, match="No space left"):
            list(load(store, base / "big"))
        upper = base / "upper"
        upper.mkdir()
        (upper / "noise").write_bytes(random.Random(1).randbytes(8 << 20))
        with pytest.raises(ImageError, match="No space left"):
            store.commit(upper, image)
        assert store.images() == [image]
        assert os.listdir(store.layout.tmp) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_store_of_another_version_is_refused(store: Store) -> None:
    (store.root / "settings.json").write_text('{"version": 99}')
    with pytest.raises(ImageError, match="another version"):
        Store.open(store.root)


def test_a_store_that_cannot_be_made_is_one_line(base: Path) -> None:
    (base / "file").write_text("")
    with pytest.raises(ImageError, match="Not a directory"):
        Store.open(base / "file" / "store")


def test_no_other_user_reaches_a_layer_or_blob(store: Store, base: Path) -> None:
    image = add(store, base, "one")
    for path in (image.layers[0].path / "file-1", store.blob(image.id)):
        done = subprocess.run(["setpriv", "--reuid=65534", "--clear-groups", "cat", path], capture_output=True)
        assert done.returncode != 0 and b"Permission denied" in done.stderr
