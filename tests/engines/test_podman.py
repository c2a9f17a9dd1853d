"""podman and buildah on our mounts, beside the kernel's overlay driver and the one that copies whole trees (vfs)."""

import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engines.image import CHANGES, CONTAINERFILE, DEBIAN_CHANGES, TAG, make_context
from tests.engines.podman import IMAGE, Store, choose, store
from tests.engines.program import write_program
from tests.support.trees import Tree, compare_trees

Stores = dict[str, Store]

_START = time.time_ns()  # of the run, before there is any store


@pytest.fixture(scope="module")
def stores(scratch: Path, layout: Path) -> Iterator[Stores]:
    """Stores of three drivers, each with the image."""
    with ExitStack() as stack:
        made = {
            name: stack.enter_context(store(scratch / f"podman-{name}", name)) for name in ("ours", "overlay", "vfs")
        }
        for each in made.values():
            each.pull(layout)
        yield made


# The kernel's driver mounts without an index: there the names of a file part when it is changed through one of them.
LINKS = {b"data/keep/one", b"data/keep/two", b"data/keep/three"}


def same(trees: dict[str, Tree], apart: Collection[bytes] = ()) -> None:
    """All trees are equal, entry by entry, but for access times, how sparse files are, and what `apart` names."""
    ours = trees["ours"]
    assert len(ours) > 300
    for name, other in trees.items():
        found = compare_trees(ours, other, ignore=("atime", "sparse"))
        found = [difference for difference in found if difference.path not in apart]
        assert not found, "\n".join([f"ours and {name}:", *map(str, found[:40])])


def test_an_image_is_the_same_tree_on_each_driver(stores: Stores) -> None:
    same({name: each.tree_of(IMAGE, _START) for name, each in stores.items()})


def test_a_changed_container_is_listed_committed_saved_and_loaded_alike(stores: Stores, tmp_path: Path) -> None:
    listed, trees = {}, {}
    for name, each in stores.items():
        each.podman("run", "--name", "changed", IMAGE, "sh", "-c", CHANGES)
        if name != "overlay":
            # With the kernel's driver, podman can't list a file that became a directory.
            listed[name] = sorted(each.podman("diff", "changed").splitlines())
        each.podman("commit", "--quiet", "changed", "localhost/changed")
        each.podman("rm", "changed")
        trees[name] = each.tree_of("localhost/changed", _START)
    same({name: trees[name] for name in ("ours", "vfs")})
    same(trees, LINKS)
    assert listed["ours"] == listed["vfs"]
    assert len(listed["ours"]) > 20

    ours, kernel = stores["ours"], stores["overlay"]
    kernel.podman("rmi", "localhost/changed")
    ours.podman("save", "--quiet", "--output", str(tmp_path / "saved"), "localhost/changed")
    kernel.podman("load", "--quiet", "--input", str(tmp_path / "saved"))
    same({"ours": trees["ours"], "loaded": kernel.tree_of("localhost/changed", _START)})
    assert ours.podman("run", "--rm", "localhost/changed", "cat", "/data/renamed/sub/new") == "inside"


@pytest.mark.parametrize("layers", [True, False], ids=["layers", "squashed"])
@pytest.mark.parametrize("program", ["podman", "buildah"])
def test_a_build_of_many_steps_makes_the_same_image(stores: Stores, tmp_path: Path, program: str, layers: bool) -> None:
    make_context(tmp_path)
    (tmp_path / "Containerfile").write_text(CONTAINERFILE.format(base=IMAGE))
    name = f"localhost/built-{program}-{layers}".lower()
    trees = {}
    # Whole copies take their time, so that builds of layers are compared with the kernel's driver alone.
    for driver in ("ours", "overlay" if layers else "vfs"):
        each = stores[driver]
        options = (f"--layers={layers}", "--no-cache", "--network=none", "--quiet", "--tag", name)
        each.run(program, "build", *options, str(tmp_path))
        trees[driver] = each.tree_of(name, _START)
    # Where podman compares trees, it misses the new time of a directory whose names are the old ones.
    same(trees, {*LINKS, b"run"} if layers else ())


def test_a_debian_root_is_changed_committed_saved_and_loaded_as_on_the_kernels_driver(
    stores: Stores, debian: Path, tmp_path: Path
) -> None:
    trees = {}
    for name in ("ours", "overlay"):
        each = stores[name]
        each.pull(debian, "localhost/debian")
        each.podman("run", "--name", "debian", "localhost/debian", "sh", "-c", DEBIAN_CHANGES)
        each.podman("commit", "--quiet", "debian", "localhost/purged")
        trees[name] = each.tree_of("localhost/purged", _START)
        each.podman("rm", "debian")
    assert len(trees["ours"]) > 3000
    same(trees)
    ours, kernel = stores["ours"], stores["overlay"]
    kernel.podman("rmi", "localhost/purged")
    ours.podman("save", "--quiet", "--output", str(tmp_path / "saved"), "localhost/purged")
    kernel.podman("load", "--quiet", "--input", str(tmp_path / "saved"))
    same({"ours": trees["ours"], "loaded": kernel.tree_of("localhost/purged", _START)})
    for each in (ours, kernel):
        each.podman("rmi", "localhost/purged", "localhost/debian")


def test_buildah_changes_a_container_step_by_step_and_commits_it(stores: Stores, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("copied")
    trees = {}
    for name in ("ours", "vfs"):
        each = stores[name]
        working = each.run("buildah", "from", "--name", "working", IMAGE)
        each.run("buildah", "run", working, "--", "sh", "-c", CHANGES)
        mounted = Path(each.run("buildah", "mount", working))
        # From outside, beside what the container did.
        (mounted / "data" / "tree" / "deep" / "file").rename(mounted / "data" / "outside")
        (mounted / "data" / "tree" / "deep").rmdir()
        each.run("buildah", "umount", working)
        each.run("buildah", "copy", "--quiet", working, str(tmp_path / "file"), "/data/tree/deep")
        each.run("buildah", "commit", "--quiet", "--rm", working, "localhost/worked")
        assert each.run("buildah", "containers", "--quiet") == ""
        trees[name] = each.tree_of("localhost/worked", _START)
        each.podman("rmi", "localhost/worked")
    same(trees)
    assert trees["ours"][b"data/tree/deep"].kind == "file"


def test_a_container_keeps_its_changes_over_stop_and_start(stores: Stores) -> None:
    ours = stores["ours"]
    ours.podman("run", "--detach", "--name", "long", IMAGE, "sleep", "1000")
    ours.note_connections(ours.podman("mount", "long"))
    ours.podman("umount", "long")
    ours.podman("exec", "long", "sh", "-c", "rm -rf /data/tree && mkdir /data/tree && echo kept >/data/tree/new")
    ours.podman("stop", "--time", "0", "long")
    ours.podman("start", "long")
    assert ours.podman("exec", "long", "cat", "/data/tree/new") == "kept"
    assert ours.podman("exec", "long", "ls", "/data/tree") == "new"
    ours.podman("rm", "--force", "--time", "0", "long")


def test_what_the_kernels_driver_made_is_there_as_before(scratch: Path, layout: Path) -> None:
    with store(scratch / "podman-switched", "overlay") as switched:
        switched.pull(layout)
        switched.podman("run", "--detach", "--name", "old", IMAGE, "sleep", "1000")
        switched.podman("exec", "old", "sh", "-c", CHANGES)
        switched.podman("commit", "--quiet", "old", "localhost/before")
        names = (IMAGE, "localhost/before")
        before = {name: switched.tree_of(name, _START) for name in names}
        choose(switched.base, "ours", write_program(switched.base / "overlayfs-py"))
        for name in names:
            same({"ours": switched.tree_of(name, _START), "before": before[name]}, LINKS)
        assert switched.podman("exec", "old", "cat", "/data/renamed/sub/new") == "inside"
        switched.podman("stop", "--time", "0", "old")
        switched.podman("start", "old")
        switched.podman("exec", "old", "sh", "-c", "cat /data/renamed/sub/new && rm -r /data/renamed")
        switched.podman("commit", "--quiet", "old", "localhost/after")
        after = switched.tree_of("localhost/after", _START)
        gone = {path for path in before["localhost/before"] if path.startswith(b"data/renamed")}
        assert before["localhost/before"].keys() - after.keys() == gone
        assert after.keys() <= before["localhost/before"].keys()


def test_eight_containers_run_at_once(stores: Stores) -> None:
    ours = stores["ours"]
    script = f"{CHANGES}\nfor i in $(seq 50); do echo $i >/data/tree/$i; done; ls /data/tree | wc -l"
    with ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(ours.podman, "run", "--rm", IMAGE, "sh", "-c", script) for _ in range(8)]
        assert [run.result() for run in runs] == ["51"] * 8


def test_an_overlay_volume_leaves_its_source_alone(stores: Stores, tmp_path: Path) -> None:
    (tmp_path / "source" / "sub").mkdir(parents=True)
    (tmp_path / "source" / "sub" / "file").write_text("old")
    script = "rm -r /volume/sub && mkdir /volume/sub && echo new >/volume/sub/other && ls /volume/sub"
    volume = f"{tmp_path}/source:/volume:O"
    assert stores["ours"].podman("run", "--rm", "--volume", volume, IMAGE, "sh", "-c", script) == "other"
    assert [path.name for path in (tmp_path / "source" / "sub").iterdir()] == ["file"]


def test_an_overlay_volume_of_a_build_leaves_its_source_alone(stores: Stores, tmp_path: Path) -> None:
    (tmp_path / "source" / "sub").mkdir(parents=True)
    (tmp_path / "source" / "sub" / "file").write_text("old")
    run = "rm -r /volume/sub && mkdir /volume/sub && echo new >/volume/sub/other && ls /volume/sub >/listed"
    (tmp_path / "Containerfile").write_text(f"FROM {IMAGE}\nRUN {run}\n")
    ours = stores["ours"]
    options = ("--quiet", "--network=none", "--volume", f"{tmp_path}/source:/volume:O", "--tag", "localhost/listed")
    ours.podman("build", *options, str(tmp_path))
    assert ours.podman("run", "--rm", "localhost/listed", "cat", "/listed") == "other"
    assert [path.name for path in (tmp_path / "source" / "sub").iterdir()] == ["file"]


def test_skopeo_copies_into_the_store_what_podman_pulls(stores: Stores, scratch: Path, layout: Path) -> None:
    with store(scratch / "podman-skopeo") as fresh:
        fresh.run("skopeo", "copy", "--quiet", f"oci:{layout}:{TAG}", f"containers-storage:{IMAGE}")
        same({"ours": fresh.tree_of(IMAGE, _START), "pulled": stores["overlay"].tree_of(IMAGE, _START)})


def test_skopeo_copies_a_layer_out_of_the_store_as_it_came_in(stores: Stores, layout: Path, tmp_path: Path) -> None:
    ours = stores["ours"]
    ours.run("skopeo", "copy", "--quiet", f"containers-storage:{IMAGE}", f"dir:{tmp_path}/copied")
    inspect = ("skopeo", "inspect", "--config", "--format", "{{.RootFS.DiffIDs}}")
    assert ours.run(*inspect, f"dir:{tmp_path}/copied") == ours.run(*inspect, f"oci:{layout}:start")


def test_prune_leaves_no_container_layer_volume_or_daemon(stores: Stores) -> None:
    ours = stores["ours"]
    ours.podman("run", "--name", "done", "--volume", "named:/named", IMAGE, "rm", "-rf", "/data")
    ours.podman("commit", "--quiet", "done")
    ours.prune_to_nothing()
