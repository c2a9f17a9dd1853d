"""Docker on our mounts, by the name of the program it calls, beside the driver that copies whole trees (vfs)."""

import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engines.docker import Docker, daemon
from tests.engines.image import CHANGES, CONTAINERFILE, TAG, make_context
from tests.engines.podman import IMAGE, store

Daemons = dict[str, Docker]
# Name → type, mode, owner, size, link, xattrs, content.
Members = dict[str, tuple[object, ...]]

_ULIMITS = ("--ulimit", "nofile=1024:1024", "--network", "none")


@pytest.fixture(scope="module")
def daemons(scratch: Path, layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    """Daemons of two drivers, each with the image."""
    archive = tmp_path_factory.mktemp("archive") / "image.tar"
    subprocess.run(
        ["skopeo", "copy", "--quiet", f"oci:{layout}:{TAG}", f"docker-archive:{archive}:{IMAGE}"],
        check=True,
        timeout=60,
    )
    with ExitStack() as stack:
        made = {"ours": stack.enter_context(daemon(scratch / "docker-ours"))}
        made["vfs"] = stack.enter_context(daemon(scratch / "docker-vfs", "vfs"))
        for each in made.values():
            each("load", "--quiet", "--input", str(archive))
        yield made


def members(docker: Docker, container: str, path: Path) -> Members:
    """Everything in a container's root, as Docker exports it."""
    docker("export", "--output", str(path), container)
    found: Members = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            content = file.read() if file else b""
            owner = (member.mode, member.uid, member.gid)
            xattrs = tuple((key, value) for key, value in member.pax_headers.items() if key.startswith("SCHILY"))
            found[member.name] = (member.type, *owner, member.linkname, xattrs, content)
    return found


def same(ours: Members, other: Members) -> None:
    assert len(ours) > 300
    assert sorted(ours) == sorted(other)
    assert [name for name in ours if ours[name] != other[name]] == []


def test_docker_uses_our_program(daemons: Daemons) -> None:
    assert daemons["ours"]("info", "--format", "{{.Driver}}") == "fuse-overlayfs"
    ours = daemons["ours"]
    ours("run", "--detach", "--name", "seen", *_ULIMITS, IMAGE, "sleep", "1000")
    found = subprocess.run(
        ["pgrep", "--full", "--list-full", f"{ours.base}/data"], capture_output=True, text=True, check=True
    )
    assert "overlayfs_py" in found.stdout
    ours("rm", "--force", "seen")


def test_a_changed_container_is_listed_committed_and_saved_alike(
    daemons: Daemons, scratch: Path, tmp_path: Path
) -> None:
    listed, trees = {}, {}
    for name, each in daemons.items():
        each("run", "--name", "changed", *_ULIMITS, IMAGE, "sh", "-c", CHANGES)
        listed[name] = sorted(each("diff", "changed").splitlines())
        each("commit", "changed", "localhost/changed:1")
        each("rm", "changed")
        each("create", "--name", "look", "localhost/changed:1")
        trees[name] = members(each, "look", tmp_path / name)
        each("rm", "look")
    same(trees["ours"], trees["vfs"])
    assert listed["ours"] == listed["vfs"]
    assert len(listed["ours"]) > 20
    daemons["ours"]("save", "--output", str(tmp_path / "saved"), "localhost/changed:1")
    with store(scratch / "docker-kernel", "overlay") as kernel:
        kernel.podman("load", "--quiet", "--input", str(tmp_path / "saved"))
        root = Path(kernel.podman("image", "mount", "localhost/changed:1"))
        try:
            assert (root / "data/renamed/sub/new").read_text() == "inside\n"
            assert sorted(path.name for path in (root / "data/tree").iterdir()) == ["deep"]
            files = {name: member[-1] for name, member in trees["ours"].items() if member[0] == tarfile.REGTYPE}
            # Docker puts these into each container.
            made = {".dockerenv", "dev/console", "etc/hosts", "etc/hostname", "etc/resolv.conf"}
            assert {name: (root / name).read_bytes() for name in files.keys() - made} == {
                name: files[name] for name in files.keys() - made
            }
        finally:
            kernel.podman("image", "unmount", "localhost/changed:1")


def test_a_build_of_many_steps_makes_the_same_image(daemons: Daemons, tmp_path: Path) -> None:
    make_context(tmp_path)
    (tmp_path / "Dockerfile").write_text(CONTAINERFILE.format(base=IMAGE))
    trees = {}
    for name, each in daemons.items():
        each("build", "--no-cache", "--quiet", "--network", "none", "--tag", "built", str(tmp_path), limit=110.0)
        each("create", "--name", "built", "built")
        trees[name] = members(each, "built", tmp_path / f"{name}.tar")
        each("rm", "built")
    same(trees["ours"], trees["vfs"])


def test_a_container_keeps_its_changes_over_stop_and_start(daemons: Daemons) -> None:
    ours = daemons["ours"]
    ours("run", "--detach", "--name", "long", *_ULIMITS, IMAGE, "sleep", "1000")
    ours("exec", "long", "sh", "-c", "rm -rf /data/tree && mkdir /data/tree && echo kept >/data/tree/new")
    ours("stop", "--time", "0", "long")
    ours("start", "long")
    assert ours("exec", "long", "cat", "/data/tree/new") == "kept"
    ours("rm", "--force", "long")


def test_eight_containers_run_at_once_and_leave_nothing(daemons: Daemons) -> None:
    ours = daemons["ours"]
    with ThreadPoolExecutor(8) as pool:
        command = ("run", *_ULIMITS, IMAGE, "sh", "-c", f"{CHANGES}\nls /data/tree")
        runs = [pool.submit(ours, *command, limit=110.0) for _ in range(8)]
        assert [run.result() for run in runs] == ["deep"] * 8
    ours("container", "prune", "--force")
    assert ours.mounts() == []
    found = subprocess.run(["pgrep", "--full", f"-m overlayfs_py.*{ours.base}/data"], capture_output=True, check=False)
    assert found.stdout == b""
