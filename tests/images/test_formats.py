"""Archives of every format are loaded, and what is saved is read by others."""

import gzip
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from overlayfs_py.images import Image, ImageError, Store
from overlayfs_py.images.load import load
from overlayfs_py.images.make import import_root
from overlayfs_py.images.save import Format, LayerForm, save
from tests.images.rig import Item, archive, digest, folder, load_one, our_tree, since, umoci_tree, write_layout
from tests.support.trees import compare_trees, read_tree

LAYERS = [archive([folder("./"), Item("a", b"a" * 10_000), Item("b", b"b")]), archive([Item(".wh.b"), Item("c", b"c")])]
PACKS: dict[str, Callable[[bytes], bytes]] = {"plain": bytes, "gzip": gzip.compress, "zstd": zstandard.compress}


@pytest.fixture
def image(store: Store, base: Path) -> Image:
    write_layout(base / "layout", LAYERS, Cmd=["/c"])
    return load_one(store, base / "layout")


@pytest.fixture
def other(base: Path) -> Store:
    return Store.open(base / "other")


@pytest.mark.parametrize("form", ["docker-archive", "oci"])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.zst", "/"])
def test_what_is_saved_is_loaded_again(
    store: Store, other: Store, base: Path, image: Image, form: Format, suffix: str
) -> None:
    store.tag(image, "host:5000/named:1")
    target = base / f"saved{suffix}"
    if suffix == "/":
        target.mkdir()
    save(store, [(image, "host:5000/named:1"), (image, "layout")], target, form=form)
    again = load_one(other, target)
    assert (again.id, set(again.names)) == (image.id, {"host:5000/named:1", "layout:latest"})
    kind = {".gz": b"\x1f\x8b", ".tgz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}.get(target.suffix, b"")
    assert suffix == "/" or target.read_bytes().startswith(kind)
    assert compare_trees(our_tree(again, base / "a"), our_tree(image, base / "b"), ignore=("atime",)) == []


@pytest.mark.parametrize("how", ["plain", "gzip", "zstd", "as-is"])
def test_layers_are_saved_as_asked(store: Store, other: Store, base: Path, image: Image, how: LayerForm) -> None:
    save(store, [(image, "layout")], base / "saved.tar", form="oci", layers=how)
    again = load_one(other, base / "saved.tar")
    assert again.id == image.id
    types = {descriptor.media_type.rpartition("layer.v1.tar")[2] for descriptor in other.manifest(again).layers}
    assert types == {{"gzip": "+gzip", "zstd": "+zstd"}.get(how, "")}


def test_saving_twice_gives_the_same_bytes(store: Store, base: Path, image: Image) -> None:
    for form, layers in (("docker-archive", "as-is"), ("oci", "gzip")):
        for name in ("one", "two"):
            save(store, [(image, "layout")], base / f"{form}-{name}.tar.gz", form=form, layers=layers)  # type: ignore[arg-type]
        assert (base / f"{form}-one.tar.gz").read_bytes() == (base / f"{form}-two.tar.gz").read_bytes()


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive"])
def test_skopeo_reads_what_is_saved(store: Store, base: Path, image: Image, form: str) -> None:
    with open(base / "saved.tar", "wb") as stream:
        save(store, [(image, "layout")], stream, form="oci" if form == "oci-archive" else "docker-archive")
    target = f"oci:{base / 'copy'}:latest"
    subprocess.run(["skopeo", "copy", "--quiet", f"{form}:{base / 'saved.tar'}", target], check=True, timeout=60)
    theirs = umoci_tree(base / "copy", base / "bundle")
    ignore = ("atime", "nlink", "foreign", "mtime")
    assert compare_trees(our_tree(image, base / "mnt"), theirs, ignore=ignore) == []


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive"])
def test_what_skopeo_writes_is_loaded(store: Store, other: Store, base: Path, image: Image, form: str) -> None:
    save(store, [(image, "")], base / "saved.tar", form="oci")
    target = f"{form}:{base / 'copy.tar'}:name/of:this"
    subprocess.run(["skopeo", "copy", "--quiet", f"oci-archive:{base / 'saved.tar'}", target], check=True, timeout=60)
    again = load_one(other, base / "copy.tar")
    assert again.names == ("name/of:this",)
    assert [layer.diff_id for layer in again.layers] == [layer.diff_id for layer in image.layers]


@pytest.mark.parametrize("pack", PACKS)
def test_an_old_docker_archive_with_links_for_layers_is_loaded(store: Store, base: Path, pack: str) -> None:
    config = json.dumps({"rootfs": {"type": "layers", "diff_ids": [digest(LAYERS[0])] * 2}}).encode()
    listed = [{"Config": "c.json", "RepoTags": ["old:1"], "Layers": ["x/layer.tar", "y/layer.tar"]}]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in (("x/layer.tar", PACKS[pack](LAYERS[0])), ("c.json", config)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("y/layer.tar")
        info.type, info.linkname = tarfile.SYMTYPE, "../x/layer.tar"
        tar.addfile(info)
        info = tarfile.TarInfo("manifest.json")
        data = json.dumps(listed).encode()
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    ((image, _),) = load(store, io.BytesIO(PACKS[pack](out.getvalue())))
    assert image.names == ("old:1",) and len(image.layers) == 2


def test_the_image_of_this_machine_is_taken_from_an_index(store: Store, base: Path) -> None:
    for name, machine in (("one", "amd64"), ("two", "s390x")):
        write_layout(base / name, [archive([Item(machine, b"x")])], machine=machine)
    blobs = base / "one" / "blobs" / "sha256"
    listed = []
    for name, machine in (("two", "s390x"), ("one", "amd64")):
        (entry,) = json.loads((base / name / "index.json").read_text())["manifests"]
        listed.append({**entry, "platform": {"os": "linux", "architecture": machine}})
        for blob in (base / name / "blobs" / "sha256").iterdir():
            (blobs / blob.name).write_bytes(blob.read_bytes())
    inner = json.dumps({"schemaVersion": 2, "manifests": listed}).encode()
    (blobs / digest(inner).removeprefix("sha256:")).write_bytes(inner)
    top = {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest(inner), "size": len(inner)}
    (base / "one" / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    ((image, _),) = load(store, base / "one", platform="linux/s390x")
    assert (image.layers[0].path / "s390x").exists()
    with pytest.raises(ImageError, match="there are: linux/s390x, linux/amd64"):
        list(load(store, base / "one", platform="plan9/386"))


def test_an_image_for_another_platform_than_asked_for_is_refused(store: Store, base: Path) -> None:
    write_layout(base / "layout", [archive([Item("file")])], machine="s390x")
    with pytest.raises(ImageError, match="the image is for linux/s390x, not for linux/amd64"):
        list(load(store, base / "layout", platform="linux/amd64"))
    ((image, _),) = load(store, base / "layout", platform="linux/s390x")
    assert image.config["architecture"] == "s390x"


@pytest.mark.parametrize("pack", PACKS)
def test_a_root_filesystem_is_imported(store: Store, base: Path, pack: str) -> None:
    archive_file = io.BytesIO(PACKS[pack](LAYERS[0]))
    changes = [
        'CMD ["/bin/sh", "-c"]',
        "ENV A=1 B='two words'",
        "ENV OLD form of it",
        "WORKDIR /srv",
        "EXPOSE 80 53/udp",
    ]
    image, warnings = import_root(store, archive_file, name="imported:1", changes=[*changes, "WORKDIR www"])
    assert warnings == [] and image.names == ("imported:1",)
    assert image.config["config"] == {
        "Cmd": ["/bin/sh", "-c"],
        "Env": ["A=1", "B=two words", "OLD=form of it"],
        "WorkingDir": "/srv/www",
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
    }
    assert our_tree(image, base / "mnt")[b"a"].size == 10_000


@pytest.mark.parametrize("line", ["", "CMD", "FROM scratch", "RUN x", 'CMD ["x', "ENV 'a=b", "ENV a=b c"])
def test_a_line_that_changes_nothing_is_refused(store: Store, line: str) -> None:
    with pytest.raises(ImageError):
        import_root(store, io.BytesIO(LAYERS[0]), changes=[line])


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_what_gnu_tar_writes_comes_out_as_it_was(store: Store, base: Path, form: str) -> None:
    root = base / "root"
    (root / "dir").mkdir(parents=True)
    for name, layout in (("sparse", ((1 << 20, b"middle"), (3 << 20, b"end"))), ("head", ((0, b"head"),))):
        with open(root / "dir" / name, "wb") as file:
            for at, data in layout:
                file.seek(at)
                file.write(data)
            file.truncate(4 << 20)
    (root / "dir" / "holes-only").touch()
    os.truncate(root / "dir" / "holes-only", 1 << 20)
    (root / "dir" / "n\nl").write_text("x")
    os.link(root / "dir" / "n\nl", root / "linked")
    os.chown(root / "linked", 3_000_000, 70_000)
    os.setxattr(root / "dir", "user.x", b"\x00\xff\n=")
    os.utime(root / "dir" / "head", ns=(5, 1_700_000_000_987_654_321))
    os.mkfifo(root / "fifo")
    extra = ["--xattrs", "--xattrs-include=*"] if form == "pax" else []
    command = [
        "tar",
        "-C",
        str(root),
        f"--format={form}",
        "--sparse",
        "--numeric-owner",
        *extra,
        "-cf",
        str(base / "root.tar"),
    ]
    subprocess.run([*command, "."], check=True)
    with open(base / "root.tar", "rb") as file:
        image, _ = import_root(store, file)
    left, right = our_tree(image, base / "mnt"), read_tree(bytes(root), since())
    ignore = ("atime", "nlink", "foreign", *(("mtime", "xattrs") if form == "gnu" else ()))
    assert compare_trees(left, right, ignore=ignore) == []
    assert left[b"dir/sparse"].sparse
