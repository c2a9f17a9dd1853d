"""podman without privilege: a user of the machine, newuidmap and newgidmap, and a /dev/fuse that all may open."""

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engines.image import CHANGES, CONTAINERFILE, make_context
from tests.engines.podman import IMAGE, Store, clear, configure, store
from tests.engines.program import write_program
from tests.engines.users import add_user, bind
from tests.support.mounts import REPOSITORY
from tests.support.trees import compare_trees

_ID = 4242
_START = time.time_ns()  # of the run, before there is any store
_AS_USER = ("setpriv", "--reuid", str(_ID), "--regid", str(_ID), "--clear-groups")


def _make_user(base: Path, stack: ExitStack) -> None:
    """A user and its FUSE device, in this mount namespace alone."""
    add_user(base, "overlay", _ID, stack)
    os.mknod(base / "fuse", stat.S_IFCHR | 0o666, os.makedev(10, 229))
    (base / "fuse").chmod(0o666)
    bind(base / "fuse", Path("/dev/fuse"), stack)


@pytest.fixture(scope="module")
def rootless(scratch: Path, layout: Path) -> Iterator[Store]:
    """The store of a user, with the image."""
    base = scratch / "podman-rootless"
    with ExitStack() as stack:
        base.mkdir(mode=0o755)
        _make_user(base, stack)
        # The checkout may lie where the user may not look.
        (base / "checkout").mkdir()
        bind(REPOSITORY, base / "checkout", stack)
        python = base / "checkout" / ".venv" / "bin" / "python"
        home = base / "home"
        home.mkdir()
        made = configure(home, "ours", write_program(base / "overlayfs-py", base / "checkout", python), _AS_USER)
        (home / "runtime").mkdir(mode=0o700)
        shutil.copytree(layout, home / "layout")
        subprocess.run(["chown", "--recursive", f"{_ID}:{_ID}", home], check=True)
        made.environment |= {"HOME": str(home), "XDG_RUNTIME_DIR": str(home / "runtime")}
        try:
            made.pull(home / "layout")
            yield made
        finally:
            clear(made)
            stack.close()
            shutil.rmtree(base)


def test_a_user_changes_commits_builds_and_saves_as_root_does(
    rootless: Store, scratch: Path, layout: Path, tmp_path: Path
) -> None:
    context = rootless.base / "TMPDIR" / "context"
    make_context(context)
    (context / "Containerfile").write_text(CONTAINERFILE.format(base=IMAGE))
    with store(scratch / "podman-root", "vfs") as root, store(scratch / "podman-kernel", "overlay") as kernel:
        root.pull(layout)
        for each in (rootless, root):
            each.inside("changed", CHANGES)
            each.podman("commit", "--quiet", "changed", "localhost/changed")
            each.podman("rm", "changed")
            each.podman(
                "build",
                "--no-cache",
                "--layers=false",
                "--network=none",
                "--quiet",
                "--tag",
                "localhost/built",
                str(context),
            )
        # Read as root, who has the ids of the image.
        for image in ("localhost/changed", "localhost/built"):
            copied = root.tree_of(image, _START)
            archive = rootless.base / "TMPDIR" / "saved"
            rootless.podman("save", "--quiet", "--output", str(archive), image)
            kernel.podman("load", "--quiet", "--input", str(archive))
            archive.unlink()
            found = compare_trees(kernel.tree_of(image, _START), copied, ignore=("atime", "sparse"))
            assert not found, "\n".join(map(str, found))
            assert len(copied) > 300
    shutil.rmtree(context)


@pytest.mark.parametrize(
    ("mapping", "identity"),
    [
        (("--userns=keep-id",), str(_ID)),
        (("--uidmap", "0:1:3000", "--uidmap", "3000:3001:2000", "--gidmap", "0:1:5000"), "0"),
        (
            (
                "--uidmap",
                "0:0:5000",
            ),
            "0",
        ),
    ],
    ids=["keep-id", "uidmap", "same ids"],
)
def test_owners_are_those_of_the_image_whatever_the_mapping(
    rootless: Store, mapping: tuple[str, ...], identity: str
) -> None:
    script = "id -u; stat -c %u:%g /data/becomes-file /data/keep/a /data/tree/deep; stat -c %a /data/keep/setuid"
    found = rootless.inside("mapped", script, *mapping).split()
    rootless.podman("rm", "mapped")
    assert found == [identity, "3:4", "1000:1000", "5:6", "4755"]


def test_root_of_a_mapped_container_changes_the_tree_as_one_without_a_mapping(rootless: Store) -> None:
    script = f"{CHANGES}\nstat -c '%u:%g %n' /data/* /data/keep/*"
    plain = rootless.inside("plain", script)
    mapped = rootless.inside("mapped", script, "--uidmap", "0:1:5000", "--gidmap", "0:1:5000")
    rootless.podman("rm", "plain", "mapped")
    assert mapped == plain
    assert "12:34 /data/keep/owner" in plain


def test_a_container_of_a_user_keeps_its_changes_over_stop_and_start(rootless: Store) -> None:
    rootless.podman("run", "--detach", "--name", "long", IMAGE, "sleep", "1000")
    rootless.podman("exec", "long", "sh", "-c", "rm -rf /data/tree && mkdir /data/tree && echo kept >/data/tree/new")
    assert "C /data/tree" in rootless.podman("diff", "long").splitlines()
    rootless.podman("stop", "--time", "0", "long")
    rootless.podman("start", "long")
    assert rootless.podman("exec", "long", "sh", "-c", "cat /data/tree/*; ls /data/tree") == "kept\nnew"
    rootless.podman("rm", "--force", "--time", "0", "long")


def test_eight_containers_of_a_user_run_at_once(rootless: Store) -> None:
    def run(number: int) -> str:
        return rootless.inside(f"many-{number}", f"{CHANGES}\necho {number} >/data/own; cat /data/own; ls /data/tree")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(8))) == [f"{number}\ndeep" for number in range(8)]
    rootless.podman("rm", *(f"many-{number}" for number in range(8)))


def test_an_overlay_volume_of_a_user_leaves_its_source_alone(rootless: Store) -> None:
    source = rootless.base / "TMPDIR" / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_text("old")
    script = "rm -r /volume/sub && mkdir /volume/sub && echo new >/volume/sub/other && ls /volume/sub"
    assert rootless.inside("volume", script, "--volume", f"{source}:/volume:O") == "other"
    assert [path.name for path in (source / "sub").iterdir()] == ["file"]
    rootless.podman("rm", "volume")
    shutil.rmtree(source)


def test_buildah_of_a_user_changes_a_container_and_commits_it(rootless: Store) -> None:
    source = rootless.base / "TMPDIR" / "source"
    (source / "sub").mkdir(parents=True)
    listing = "cd /data && find . -exec stat -c '%n %F %a %u:%g' {} + | sort && find . -type f -exec md5sum {} + | sort"
    plain = rootless.inside("plain", f"{CHANGES}\n{listing}")
    working = rootless.run("buildah", "from", "--name", "working", IMAGE)
    script = f"rmdir /volume/sub && echo new >/volume/file\n{CHANGES}"
    volume = ("--network", "host", "--volume", f"{source}:/volume:O")
    rootless.run("buildah", "run", *volume, working, "--", "sh", "-c", script)
    rootless.run("buildah", "commit", "--quiet", "--rm", working, "localhost/worked")
    assert rootless.inside("worked", listing, image="localhost/worked") == plain
    assert [path.name for path in source.iterdir()] == ["sub"]
    rootless.podman("rm", "plain", "worked")
    rootless.podman("rmi", "localhost/worked")
    shutil.rmtree(source)


def test_prune_leaves_a_user_no_container_layer_volume_or_daemon(rootless: Store) -> None:
    rootless.inside("done", "rm -rf /data", "--volume", "named:/named")
    rootless.podman("commit", "--quiet", "done")
    rootless.prune_to_nothing()
