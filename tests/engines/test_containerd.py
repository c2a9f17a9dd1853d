"""containerd runs containers on our snapshotter, and finds what it finds on its own."""

import gzip
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engines.containerd_rig import IMAGE, OURS, THEIRS, Containerd, chain, containerd
from tests.engines.image import CHANGES, DEBIAN_CHANGES, TAG
from tests.support.trees import Difference, Tree, compare_trees, read_tree, show_tree


@pytest.fixture(scope="module")
def engine(scratch: Path) -> Iterator[Containerd]:
    with containerd(scratch / "containerd") as running:
        yield running


def check_same(ours: Tree, theirs: Tree, accepted: tuple[tuple[bytes, str], ...] = ()) -> None:
    # Access times are those of the comparison itself.
    found = compare_trees(ours, theirs, ignore=("atime",))
    different = [difference for difference in found if (difference.path, difference.field) not in accepted]
    assert not different, _both(different, ours, theirs)


def _both(different: list[Difference], ours: Tree, theirs: Tree) -> str:
    return "\n".join([*map(str, different), "ours:", show_tree(ours), "theirs:", show_tree(theirs)])


# The kernel's overlayfs, as containerd mounts it, parts hard links when one of them is changed; we keep them together.
LINKS = (
    (b"data/keep/one", "nlink"),
    (b"data/keep/two", "nlink"),
    (b"data/keep/two", "group"),
    (b"data/keep/three", "nlink"),
)


def test_an_image_unpacks_to_the_tree_that_the_overlayfs_snapshotter_makes(engine: Containerd) -> None:
    ours, theirs = (engine.tree(kind, chain(engine.base / "layout")) for kind in (OURS, THEIRS))
    assert len(ours) > 300
    check_same(ours, theirs)


def test_changes_in_a_container_are_seen_in_it_diffed_and_committed_as_on_overlayfs(engine: Containerd) -> None:
    lived: list[Tree] = []
    diffs: list[dict[str, tuple[object, ...]]] = []
    kept: list[Tree] = []
    for kind in (OURS, THEIRS):
        with engine.living(kind, f"changed-{kind}") as root:
            engine.exec(f"changed-{kind}", CHANGES)
            diffs.append(engine.difference(kind, f"changed-{kind}"))
            assert engine.exec(f"changed-{kind}", "cat /etc/motd /data/becomes-dir/z") == "new\ny\n"
            lived.append(read_tree(bytes(root), engine.since))
            assert engine.snapshots(kind, "usage", f"changed-{kind}").splitlines()[1].startswith(f"changed-{kind}")
            if kind == OURS:
                engine.restart_snapshotter(signal.SIGTERM)
            assert engine.exec(f"changed-{kind}", "echo after >/data/after && cat /data/after") == "after\n"
            engine.end(f"changed-{kind}")
            engine.snapshots(kind, "commit", f"commit-{kind}", f"changed-{kind}")
        kept.append(engine.tree(kind, f"commit-{kind}"))
        engine.release(kind, f"commit-{kind}")
        assert f"commit-{kind}" not in engine.snapshots(kind, "ls")
    check_same(lived[0], lived[1], LINKS)
    check_same(kept[0], kept[1])
    # With `one` linked to, its other name of the image stays a name of it, so ours has that in the archive as well.
    assert diffs[0].pop("data/keep/two")[0] == tarfile.LNKTYPE
    assert diffs[0] == diffs[1]
    assert {"data/.wh.gone", "data/keep/moved", "data/renamed/sub/new"} <= diffs[0].keys()


def test_a_debian_root_is_changed_diffed_and_committed_as_on_overlayfs(engine: Containerd, debian: Path) -> None:
    image = f"example.org/debian:{TAG}"
    diffs, kept = [], []
    for kind in (OURS, THEIRS):
        engine.take(debian, kind, image)
        with engine.living(kind, f"debian-{kind}", image):
            engine.exec(f"debian-{kind}", DEBIAN_CHANGES)
            diffs.append(engine.difference(kind, f"debian-{kind}"))
            engine.end(f"debian-{kind}")
            engine.snapshots(kind, "commit", f"purged-{kind}", f"debian-{kind}")
        kept.append(engine.tree(kind, f"purged-{kind}"))
        engine.release(kind, f"purged-{kind}")
    engine.ctr("image", "rm", "--sync", image)
    assert len(kept[0]) > 3000
    check_same(kept[0], kept[1])
    assert diffs[0].keys() == diffs[1].keys()
    assert [name for name in diffs[0] if diffs[0][name] != diffs[1][name]] == []


def test_what_was_changed_on_us_becomes_an_image_that_overlayfs_unpacks_to_the_same_tree(
    engine: Containerd, tmp_path: Path
) -> None:
    with engine.living(OURS, "source"):
        engine.exec("source", CHANGES)
        (tmp_path / "layer.tar").write_bytes(gzip.decompress(engine.archive(OURS, "source")))
        engine.end("source")
        engine.snapshots(OURS, "commit", "committed", "source")
    engine.ctr("image", "export", str(tmp_path / "exported.tar"), IMAGE)
    layout = tmp_path / "layout"
    # Without the annotations, which name the image.
    copy = ["skopeo", "copy", "--quiet", f"oci-archive:{tmp_path}/exported.tar", f"oci:{layout}:{TAG}"]
    subprocess.run(copy, check=True, timeout=60)
    add = ["umoci", "raw", "add-layer", "--image", f"{layout}:{TAG}", str(tmp_path / "layer.tar")]
    subprocess.run(add, check=True, timeout=60)
    image = f"example.org/changed:{TAG}"
    kept = engine.tree(OURS, "committed")
    unpacked = engine.tree(THEIRS, engine.take(layout, THEIRS, image))
    engine.ctr("image", "rm", "--sync", image)
    engine.release(OURS, "committed")
    # A live container's archive has all names of a file that was linked to; a commit, which ends the index, those that
    # the upper layer has. Of xattrs, containerd keeps that of the capabilities alone in what it archives.
    check_same(kept, unpacked, (*LINKS, (b"data/keep/a", "xattrs")))


def test_a_container_keeps_its_changes_over_stop_and_start(engine: Containerd) -> None:
    with engine.living(OURS, "long"):
        engine.exec("long", "rm -rf /data/tree && mkdir /data/tree && echo kept >/data/tree/new")
        engine.end("long")
        engine.start_again("long")
        assert engine.exec("long", "cat /data/tree/*; ls /data/tree") == "kept\nnew\n"


def test_a_container_outlives_a_killed_snapshotter(engine: Containerd) -> None:
    with engine.living(OURS, "outlives"):
        engine.exec("outlives", "echo kept >/kept")
        engine.restart_snapshotter(signal.SIGKILL)
        assert engine.exec("outlives", "rm /etc/motd; cat /kept") == "kept\n"
        assert ".wh.motd" in " ".join(engine.difference(OURS, "outlives"))
    assert "outlives" not in engine.snapshots(OURS, "ls")


def test_containerd_itself_can_be_started_again_under_a_container(engine: Containerd) -> None:
    with engine.living(OURS, "stays"):
        engine.exec("stays", "echo before >/before")
        engine.process.send_signal(signal.SIGTERM)
        engine.process.wait(30)
        engine.start()
        assert engine.exec("stays", "cat /before /etc/motd") == "before\nwelcome\n"


def test_eight_containers_at_once_see_their_own_changes_alone(engine: Containerd) -> None:
    def run(number: int) -> str:
        change = f"echo >/own-{number}; rm -rf /data/tree; echo {number} >/etc/motd; sleep 1"
        return engine.container(
            OURS, f"many-{number}", f"{change}; cat /etc/motd; ls -d /data/tree /own* 2>&1; echo end"
        )

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(run, range(8)))
    gone = "ls: /data/tree: No such file or directory"
    assert [sorted(words.splitlines()) for words in said] == [
        sorted([str(number), gone, f"/own-{number}", "end"]) for number in range(8)
    ]
    assert engine.container(OURS, "after", "cat /etc/motd; ls -d /own* 2>/dev/null || echo none") == "welcome\nnone\n"


def test_a_container_in_a_user_namespace_owns_the_files_of_its_image(engine: Containerd) -> None:
    maps = ("--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536")
    script = "stat -c '%u %g %n' /etc/motd /data/becomes-file; echo x >/new; stat -c %u /new; cat /proc/self/uid_map"
    said = engine.container(OURS, "mapped", script, *maps).split()
    assert said == ["0", "0", "/etc/motd", "3", "4", "/data/becomes-file", "0", "0", "100000", "65536"]


def test_what_a_second_namespace_removes_is_its_own(engine: Containerd) -> None:
    engine.collect()
    before = engine.snapshotter.directories()
    engine.load(OURS, "second")
    engine.ctr("-n", "second", "image", "rm", "--sync", IMAGE)
    assert engine.snapshotter.directories() == before
    assert engine.container(OURS, "first", "cat /etc/motd") == "welcome\n"


def test_removing_the_image_removes_its_layers_and_nothing_stays_mounted(engine: Containerd) -> None:
    engine.collect()
    assert len(engine.snapshotter.directories()) == 3
    engine.ctr("image", "rm", "--sync", IMAGE)
    assert engine.snapshotter.directories() == []
    assert engine.mounts() == []
    engine.load(OURS)
    engine.load(THEIRS)
    assert len(engine.snapshotter.directories()) == 3
