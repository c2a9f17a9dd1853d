"""Docker on our mounts, by the name of the program it calls, beside its drivers overlay2 and vfs (of whole copies)."""

import subprocess
import tarfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engines.docker import Docker, daemon
from tests.engines.image import CHANGES, CONTAINERFILE, DEBIAN_CHANGES, TAG, make_context
from tests.engines.podman import IMAGE
from tests.engines.users import add_user

Daemons = dict[str, Docker]
# Name → type, mode, owner, size, link, xattrs, content.
Members = dict[str, tuple[object, ...]]

_ULIMITS = ("--ulimit", "nofile=1024:1024", "--network", "none")


# overlay2 mounts without an index: there the names of a file part when it is changed through one of them.
LINKS = {"data/keep/one", "data/keep/two", "data/keep/three"}


def archive(layout: Path, path: Path, name: str = IMAGE) -> Path:
    """The image of an OCI layout as Docker loads it, under a name."""
    command = ("skopeo", "copy", "--quiet", f"oci:{layout}:{TAG}", f"docker-archive:{path}:{name}")
    subprocess.run(command, check=True, timeout=60)
    return path


@pytest.fixture(scope="module")
def loaded(layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive(layout, tmp_path_factory.mktemp("archive") / "image.tar")


@pytest.fixture(scope="module")
def daemons(scratch: Path, loaded: Path) -> Iterator[Daemons]:
    """Daemons of three drivers, each with the image."""
    with ExitStack() as stack:
        made = {"ours": stack.enter_context(daemon(scratch / "docker-ours"))}
        for driver in ("vfs", "overlay2"):
            made[driver] = stack.enter_context(daemon(scratch / f"docker-{driver}", driver))
        for each in made.values():
            each("load", "--quiet", "--input", str(loaded))
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


def same(trees: dict[str, Members], apart: Collection[str] = ()) -> None:
    """All are equal, entry by entry, but for what `apart` names."""
    ours = trees["ours"]
    assert len(ours) > 300
    for other in trees.values():
        assert sorted(ours) == sorted(other)
        assert [name for name in ours if ours[name] != other[name] and name not in apart] == []


def content(docker: Docker, image: str, path: Path) -> Members:
    """Everything in an image, as a new container of it shows it."""
    docker("create", "--name", "look", image)
    try:
        return members(docker, "look", path)
    finally:
        docker("rm", "look")


def our_daemons(docker: Docker) -> list[str]:
    """The command lines of the processes of our program that serve a mount of this Docker."""
    pattern = f"{docker.base}/bin/fuse-overlayfs .*{docker.base}/data"
    found = subprocess.run(["pgrep", "--full", "--list-full", pattern], capture_output=True, text=True, check=False)
    return found.stdout.splitlines()


def test_docker_uses_our_program(daemons: Daemons) -> None:
    assert daemons["ours"]("info", "--format", "{{.Driver}}") == "fuse-overlayfs"
    ours = daemons["ours"]
    ours("run", "--detach", "--name", "seen", *_ULIMITS, IMAGE, "sleep", "1000")
    found = our_daemons(ours)
    ours("rm", "--force", "seen")
    assert found


def test_a_changed_container_is_listed_committed_saved_and_loaded_alike(daemons: Daemons, tmp_path: Path) -> None:
    listed, trees = {}, {}
    for name, each in daemons.items():
        each("run", "--name", "changed", *_ULIMITS, IMAGE, "sh", "-c", CHANGES)
        listed[name] = sorted(each("diff", "changed").splitlines())
        each("commit", "changed", "localhost/changed:1")
        each("rm", "changed")
        trees[name] = content(each, "localhost/changed:1", tmp_path / name)
    same({name: trees[name] for name in ("ours", "vfs")})
    same(trees, LINKS)
    assert listed["ours"] == listed["vfs"]
    assert len(listed["ours"]) > 20
    ours, kernel = daemons["ours"], daemons["overlay2"]
    kernel("rmi", "localhost/changed:1")
    ours("save", "--output", str(tmp_path / "saved"), "localhost/changed:1")
    kernel("load", "--quiet", "--input", str(tmp_path / "saved"))
    same({"ours": trees["ours"], "loaded": content(kernel, "localhost/changed:1", tmp_path / "loaded")})


def test_a_debian_root_is_changed_committed_saved_and_loaded_as_on_overlay2(
    daemons: Daemons, debian: Path, tmp_path: Path
) -> None:
    path = archive(debian, tmp_path / "debian.tar", "localhost/debian:1")
    trees = {}
    for name in ("ours", "overlay2"):
        each = daemons[name]
        each("load", "--quiet", "--input", str(path))
        each("run", "--name", "debian", *_ULIMITS, "localhost/debian:1", "sh", "-c", DEBIAN_CHANGES)
        each("commit", "debian", "localhost/purged:1")
        each("rm", "debian")
        trees[name] = content(each, "localhost/purged:1", tmp_path / name)
    assert len(trees["ours"]) > 3000
    same(trees)
    ours, kernel = daemons["ours"], daemons["overlay2"]
    kernel("rmi", "localhost/purged:1")
    ours("save", "--output", str(tmp_path / "saved"), "localhost/purged:1")
    kernel("load", "--quiet", "--input", str(tmp_path / "saved"))
    same({"ours": trees["ours"], "loaded": content(kernel, "localhost/purged:1", tmp_path / "loaded")})


def test_a_build_of_many_steps_makes_the_same_image(daemons: Daemons, tmp_path: Path) -> None:
    make_context(tmp_path)
    (tmp_path / "Dockerfile").write_text(CONTAINERFILE.format(base=IMAGE))
    trees = {}
    for name in ("ours", "overlay2"):
        each = daemons[name]
        each("build", "--no-cache", "--quiet", "--network", "none", "--tag", "built", str(tmp_path))
        trees[name] = content(each, "built", tmp_path / f"{name}.tar")
    same(trees, LINKS)


def test_a_container_keeps_its_changes_over_stop_and_start(daemons: Daemons) -> None:
    ours = daemons["ours"]
    ours("run", "--detach", "--name", "long", *_ULIMITS, IMAGE, "sleep", "1000")
    ours("exec", "long", "sh", "-c", "rm -rf /data/tree && mkdir /data/tree && echo kept >/data/tree/new")
    ours("stop", "--time", "0", "long")
    ours("start", "long")
    assert ours("exec", "long", "cat", "/data/tree/new") == "kept"
    ours("rm", "--force", "long")


def test_a_daemon_with_mapped_ids_runs_containers_that_own_the_files_of_their_image(
    scratch: Path, loaded: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        add_user(tmp_path, "remapped", 4242, stack)
        ours = stack.enter_context(daemon(scratch / "docker-mapped", "fuse-overlayfs", "--userns-remap=remapped"))
        ours("load", "--quiet", "--input", str(loaded))
        script = f"{CHANGES}\nstat -c '%u:%g %n' /data/keep/a /data/keep/owner /etc/motd; cat /proc/self/uid_map"
        said = ours("run", "--name", "mapped", *_ULIMITS, IMAGE, "sh", "-c", script).split()
        assert said == [
            *("1000:1000", "/data/keep/a", "12:34", "/data/keep/owner", "0:0", "/etc/motd"),
            *("0", "200000", "65536"),
        ]
        assert len(ours("diff", "mapped").splitlines()) > 20
        ours("rm", "mapped")


def test_eight_containers_run_at_once_and_prune_leaves_nothing(daemons: Daemons) -> None:
    ours = daemons["ours"]
    with ThreadPoolExecutor(8) as pool:
        command = ("run", *_ULIMITS, IMAGE, "sh", "-c", f"{CHANGES}\nls /data/tree")
        runs = [pool.submit(ours, *command) for _ in range(8)]
        assert [run.result() for run in runs] == ["deep"] * 8
    ours("run", *_ULIMITS, "--volume", "named:/named", IMAGE, "true")
    ours("system", "prune", "--all", "--force", "--volumes")
    for what in ("container ls --all", "image ls --all", "volume ls"):
        assert ours(*what.split(), "--quiet") == ""
    assert ours.mounts() == []
    assert [path.name for path in (ours.base / "data" / "fuse-overlayfs").iterdir()] in ([], ["l"])
    assert our_daemons(ours) == []
