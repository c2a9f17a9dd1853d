"""The snapshotter over its socket: containerd's rules of kinds, names, parents, labels, filters and errors."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from overlayfs_py.drivers.containerd import snapshots_pb2 as api
from tests.conftest import Layers
from tests.drivers.rig import Client, Process
from tests.support.mounts import our_mount

CODE = grpc.StatusCode


@contextlib.contextmanager
def refused(code: grpc.StatusCode) -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() == code, caught.value.details()


def upper(mounts: list[api.Mount]) -> Path:
    """Where what is written to an active snapshot lies."""
    (mount,) = mounts
    if mount.type == "bind":
        return Path(mount.source)
    return Path(option(mount, "upperdir"))


def option(mount: api.Mount, name: str) -> str:
    (value,) = [word.partition("=")[2] for word in mount.options if word.startswith(f"{name}=")]
    return value


def committed(client: Client, name: str, parent: str = "", labels: dict[str, str] | None = None) -> Path:
    """A committed snapshot with one file in it, named as itself; the directory of its layer."""
    layer = upper(client.prepare(f"making-{name}", parent))
    (layer / name).write_text(name)
    client.commit(name, f"making-{name}", labels)
    return layer


def test_a_snapshot_without_parents_is_a_bind_mount(client: Client) -> None:
    (mount,) = client.prepare("base")
    assert (mount.type, list(mount.options)) == ("bind", ["rw", "rbind"])
    assert Path(mount.source).is_dir()
    (view,) = client.view("empty")
    assert (view.type, list(view.options)) == ("bind", ["ro", "rbind"])
    assert os.listdir(view.source) == []


def test_a_snapshot_on_parents_is_an_overlay_with_the_nearest_parent_on_top(client: Client) -> None:
    first = committed(client, "first")
    second = committed(client, "second", "first")
    (mount,) = client.prepare("container", "second")
    assert (mount.type, mount.source) == ("fuse3.overlayfs-py", "overlay")
    assert option(mount, "lowerdir") == f"{second}:{first}"
    assert Path(option(mount, "upperdir")).parent == Path(option(mount, "workdir")).parent
    assert client.mounts("container") == [mount]


def test_a_view_of_one_layer_is_a_read_only_bind_and_of_more_an_overlay_without_an_upper(client: Client) -> None:
    first = committed(client, "first")
    second = committed(client, "second", "first")
    (one,) = client.view("one", "first")
    assert (one.type, one.source, list(one.options)) == ("bind", str(first), ["ro", "rbind"])
    (two,) = client.view("two", "second")
    assert (two.type, list(two.options)) == ("fuse3.overlayfs-py", ["ro", f"lowerdir={second}:{first}"])


def test_the_root_of_a_snapshot_has_the_owner_and_mode_of_its_parents(client: Client) -> None:
    layer = committed(client, "first")
    os.chown(layer, 12, 34)
    layer.chmod(0o1750)
    status = upper(client.prepare("container", "first")).stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (12, 34, 0o1750)


def test_a_snapshot_is_known_by_its_kind_parent_times_and_labels(client: Client) -> None:
    committed(client, "layer")
    client.prepare("container", "layer", {"a": "1", "b": ""})
    info = client.stat("container")
    assert (info.name, info.parent, info.kind, dict(info.labels)) == ("container", "layer", api.ACTIVE, {"a": "1"})
    assert info.created_at.ToNanoseconds() == info.updated_at.ToNanoseconds() > 0
    client.view("view", "layer")
    assert [client.stat(name).kind for name in ("layer", "view")] == [api.COMMITTED, api.VIEW]


def test_a_commit_takes_the_name_and_its_own_labels_alone(client: Client) -> None:
    client.prepare("active", labels={"old": "1"})
    client.commit("layer", "active", {"new": "2"})
    info = client.stat("layer")
    assert (info.kind, dict(info.labels)) == (api.COMMITTED, {"new": "2"})
    assert client.find() == ["layer"]


def test_names_that_are_not_there_are_not_found(client: Client) -> None:
    for call in (client.stat, client.mounts, client.remove, client.usage):
        with refused(CODE.NOT_FOUND):
            call("missing")
    with refused(CODE.NOT_FOUND):
        client.prepare("container", "missing")
    with refused(CODE.NOT_FOUND):
        client.commit("layer", "missing")
    with refused(CODE.NOT_FOUND):
        client.update("missing", {"a": "1"})
    assert client.find() == []


def test_a_name_is_taken_once_among_active_and_committed_ones(client: Client) -> None:
    committed(client, "layer")
    client.prepare("active")
    for name in ("layer", "active"):
        with refused(CODE.ALREADY_EXISTS):
            client.prepare(name)
        with refused(CODE.ALREADY_EXISTS):
            client.view(name)
        with refused(CODE.ALREADY_EXISTS):
            client.commit(name, "active")


def test_what_has_the_wrong_kind_is_refused(client: Client) -> None:
    committed(client, "layer")
    client.prepare("active")
    client.view("view")
    with refused(CODE.INVALID_ARGUMENT):
        client.prepare("other", "active")
    for key in ("view", "layer"):
        with refused(CODE.FAILED_PRECONDITION):
            client.commit("name", key)
    with refused(CODE.FAILED_PRECONDITION):
        client.mounts("layer")
    for name, labels in (("", {}), ("other", {"": "1"}), ("other", {"a": "x" * 4096})):
        with refused(CODE.INVALID_ARGUMENT):
            client.prepare(name, labels=labels)
    assert client.find() == ["layer", "active", "view"]


def test_a_parent_is_removed_after_its_children_alone(process: Process, client: Client) -> None:
    committed(client, "layer")
    client.prepare("container", "layer")
    with refused(CODE.FAILED_PRECONDITION):
        client.remove("layer")
    assert len(process.directories()) == 2
    client.remove("container")
    client.remove("layer")
    assert (client.find(), process.directories()) == ([], [])


def test_labels_are_changed_by_field_mask(client: Client) -> None:
    client.prepare("active", labels={"a": "1", "b.c/d": "2", "e": "3"})
    before = client.stat("active").updated_at.ToNanoseconds()
    info = client.update("active", {"b.c/d": "9", "ignored": "x"}, ["labels.b.c/d", "labels.e"])
    assert dict(info.labels) == {"a": "1", "b.c/d": "9"}
    assert info.updated_at.ToNanoseconds() > before
    assert info.created_at.ToNanoseconds() == client.stat("active").created_at.ToNanoseconds()
    assert dict(client.update("active", {"f": "1"}, ["labels"]).labels) == {"f": "1"}
    assert dict(client.update("active", {"g": "1"}).labels) == {"g": "1"}
    for path in ("kind", "parent", "labelsx", "name"):
        with refused(CODE.INVALID_ARGUMENT):
            client.update("active", {}, [path])
    assert dict(client.stat("active").labels) == {"g": "1"}


def test_a_list_is_filtered_by_kind_name_parent_and_labels(client: Client) -> None:
    committed(client, "sha256:1", labels={"containerd.io/snapshot.ref": "sha256:1", "stage": "one two"})
    client.prepare("c1", "sha256:1", {"stage": "run"})
    client.view("v1", "sha256:1")
    everything = ["sha256:1", "c1", "v1"]
    expected = {
        "": everything,
        "kind==active": ["c1"],
        "kind!=active": ["sha256:1", "v1"],
        "name==sha256:1": ["sha256:1"],
        'parent=="sha256:1"': ["c1", "v1"],
        'parent=="sha256:1",kind==view': ["v1"],
        'labels."containerd.io/snapshot.ref"==sha256:1,parent==""': ["sha256:1"],
        "labels.stage": ["sha256:1", "c1"],
        'labels.stage=="one two"': ["sha256:1"],
        'labels.stage=="one\\x20two"': ["sha256:1"],
        "name~=^[cv]1$": ["c1", "v1"],
        "labels.stage~=/^(run|one)/": ["sha256:1", "c1"],
        "name~=|^v/?1|": ["v1"],
        "unknown": [],
        "labels.stage!=run": ["sha256:1", "v1"],
    }
    assert {text: client.find(text) for text in expected} == expected
    assert client.find() == everything
    assert client.find("kind==view", "kind==active") == ["c1", "v1"]
    for text in ("kind=active", "kind==", "==x", "kind==active,", 'name=="x', "name~=(", "kind==a b", 'name=="\\q"'):
        with refused(CODE.INVALID_ARGUMENT):
            client.find(text)


def test_a_list_of_many_comes_whole(client: Client) -> None:
    names = [f"s{number}" for number in range(250)]
    for name in names:
        client.view(name)
    assert client.find() == names


def test_usage_counts_blocks_and_inodes_and_hard_links_once(client: Client) -> None:
    layer = upper(client.prepare("active"))
    (layer / "dir").mkdir()
    (layer / "dir" / "data").write_bytes(os.urandom(100_000))
    os.link(layer / "dir" / "data", layer / "again")
    with (layer / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 30)
    os.symlink("dir", layer / "link")
    blocks = subprocess.run(["du", "-s", "-B1", layer], capture_output=True, check=True).stdout.split()[0]
    assert client.usage("active") == (int(blocks), 5)
    client.commit("layer", "active")
    (layer / "later").touch()
    assert client.usage("layer") == (int(blocks), 5), "a committed one does not change"
    client.view("view", "layer")
    assert client.usage("view") == (0, 0)


def test_trees_deeper_than_a_path_may_be_long_are_measured_and_removed(process: Process, client: Client) -> None:
    layer = upper(client.prepare("deep"))
    depth = 1500
    fd = os.open(layer, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("deeper", dir_fd=fd)
        below = os.open("deeper", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    assert client.usage("deep")[1] == depth + 1
    client.remove("deep")
    assert process.directories() == []


def test_content_that_is_there_is_not_prepared_again(client: Client) -> None:
    reference = {"containerd.io/snapshot.ref": "sha256:chain"}
    client.prepare("extract-1", labels=reference)
    client.prepare("extract-2", labels=reference)
    client.commit("a/1/sha256:chain", "extract-1", reference)
    with refused(CODE.ALREADY_EXISTS):
        client.prepare("extract-3", labels=reference)
    client.prepare("extract-4", "a/1/sha256:chain", reference)
    client.view("view", "", reference)
    client.remove("extract-4")
    client.remove("a/1/sha256:chain")
    client.prepare("extract-3", labels=reference)


def test_a_layer_that_is_unpacked_on_others_is_written_to_without_a_mount(client: Client) -> None:
    first = committed(client, "first")
    key = "default/7/extract-123-Ab_- sha256:chain"
    (mount,) = client.prepare(key, "first")
    assert (mount.type, option(mount, "lowerdir")) == ("overlay", str(first))
    assert Path(option(mount, "upperdir")).parent == Path(option(mount, "workdir")).parent
    assert client.mounts(key) == [mount]
    mapping = {"containerd.io/snapshot/uidmapping": "0:100000:65536"}
    others: list[tuple[str, dict[str, str]]] = [("extract-me", {}), ("extract-1 a/b", {}), ("my extract-1 a", {})]
    for other, labels in [(key.replace("123", "124"), mapping), *others]:
        (mount,) = client.prepare(other, "first", labels)
        assert mount.type == "fuse3.overlayfs-py"


def test_id_mappings_become_mount_options_and_malformed_ones_are_refused(client: Client) -> None:
    layer = committed(client, "layer")
    labels = {
        "containerd.io/snapshot/uidmapping": "0:100000:1000,1000:5000:1",
        "containerd.io/snapshot/gidmapping": "0:200000:65536",
    }
    mapped = ["uidmapping=0:100000:1000:1000:5000:1", "gidmapping=0:200000:65536"]
    (view,) = client.view("view", "layer", labels)
    assert (view.type, list(view.options)) == ("fuse3.overlayfs-py", [*mapped, "ro", f"lowerdir={layer}"])
    (container,) = client.prepare("container", "layer", labels)
    assert list(container.options)[:2] == mapped
    (base,) = client.prepare("base", "", labels)
    assert base.type == "fuse3.overlayfs-py"
    assert os.listdir(option(base, "lowerdir")) == []
    for value in ("0:1", "a:b:c", "0:1:2;reboot", "0:1:2,", " "):
        with refused(CODE.INVALID_ARGUMENT):
            client.prepare("other", "layer", {"containerd.io/snapshot/uidmapping": value})


def test_a_mount_with_mapped_ids_shows_those_of_the_host_and_keeps_those_of_the_image(
    client: Client, layers: Layers
) -> None:
    layer = committed(client, "layer")
    os.chown(layer, 0, 0)
    os.chown(layer / "layer", 7, 8)
    labels = {
        "containerd.io/snapshot/uidmapping": "0:100000:65536",
        "containerd.io/snapshot/gidmapping": "0:200000:65536",
    }
    (mount,) = client.prepare("container", "layer", labels)
    mapped = ",".join(word for word in mount.options if "mapping=" in word)
    own = upper([mount])
    with our_mount(layers.mnt, [layer], own, option(mount, "workdir"), mapped):
        shown = (layers.mnt / "layer").stat()
        assert (shown.st_uid, shown.st_gid) == (100007, 200008)
        (layers.mnt / "new").touch()
        os.chown(layers.mnt / "new", 100001, 200002)
        os.chmod(layers.mnt / "layer", 0o600)
    kept = [(status.st_uid, status.st_gid) for status in ((own / "new").stat(), (own / "layer").stat())]
    assert kept == [(1, 2), (7, 8)]
