"""podman without privilege: a user of the machine, newuidmap and newgidmap, and a /dev/fuse that all may open."""

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
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


def test_a_user_changes_commits_and_builds_as_root_does(
    rootless: Store, scratch: Path, layout: Path, tmp_path: Path
) -> None:
    context = rootless.base / "TMPDIR" / "context"
    make_context(context)
    (context / "Containerfile").write_text(CONTAINERFILE.format(base=IMAGE))
    with store(scratch / "podman-root", "vfs") as root:
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
            root.podman("rmi", image)
            archive = rootless.base / "TMPDIR" / "saved"
            rootless.podman("save", "--quiet", "--output", str(archive), image)
            root.podman("load", "--quiet", "--input", str(archive))
            archive.unlink()
            found = compare_trees(root.tree_of(image, _START), copied, ignore=("atime", "sparse"))
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
