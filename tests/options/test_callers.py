"""The command lines of container engines, as they send them.

Sources: containers/storage drivers/overlay (podman), pkg/overlay (buildah), moby daemon/graphdriver/fuse-overlayfs,
containerd/fuse-overlayfs-snapshotter, and libfuse's mount.fuse.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import Checkout, Layers
from tests.options.rig import mount_fields, mount_flags
from tests.support.mounts import REPOSITORY, mounted_at, unmount
from tests.support.syscalls import MS_BIND, mount, umount
from tests.support.waiting import wait_until

_LIMIT: Final = 30  # seconds for anything the program does
_LOWERS: Final = 128
_NAMES: Final = _LOWERS + 4  # in all layers together
_FIRST_SUBORDINATE: Final = 200000


@dataclass(frozen=True, slots=True)
class Store:
    """A layer store: the layers, each under its id, and short links to them in `l/`, the topmost first."""

    root: Path
    links: tuple[str, ...]
    container: str

    @property
    def upper(self) -> Path:
        return self.root / self.container / "diff"

    @property
    def merged(self) -> Path:
        return self.root / self.container / "merged"

    def lowerdir(self) -> str:
        return ":".join(self.links)


@pytest.fixture(scope="module")
def image(scratch: Path) -> Iterator[Store]:
    """The layers of an image, which no mount changes; the topmost has files of several owners."""
    root = scratch / "overlay"
    (root / "l").mkdir(parents=True)
    links = []
    for number in range(_LOWERS):
        layer = root / secrets.token_hex(32) / "diff"
        layer.mkdir(parents=True)
        (layer / f"layer-{number}").write_text(str(number))
        (layer / "same").write_text(str(number))
        name = secrets.token_hex(32).upper()  # 26 characters in a real store; this makes the option as long as Docker's
        (root / "l" / name).symlink_to(f"../{layer.parent.name}/diff")
        links.append(f"l/{name}")
    for name, uid in (("root", 0), ("user", 4242), ("other", 4243)):
        path = root / links[0] / f"owned-by-{name}"
        path.write_text("")
        os.chown(path, _FIRST_SUBORDINATE + uid, _FIRST_SUBORDINATE + uid)
    yield Store(root, tuple(links), "")
    shutil.rmtree(root)


@pytest.fixture
def store(image: Store) -> Iterator[Store]:
    """The store with a new container in it."""
    made = replace(image, container=secrets.token_hex(32))
    for name in ("diff", "work", "merged"):
        (made.root / made.container / name).mkdir(parents=True)
    yield made
    shutil.rmtree(made.root / made.container)


@pytest.fixture(params=["overlayfs-py", "fuse-overlayfs"])
def search_path(layers: Layers, checkout: Checkout, request: pytest.FixtureRequest) -> tuple[str, str]:
    """The name the program is called by, and a PATH on which it is found first."""
    folder = layers.add("bin")
    script = folder / "overlayfs-py"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={checkout.path} exec {checkout.python} -m overlayfs_py "$@"\n')
    script.chmod(0o755)
    (folder / "fuse-overlayfs").symlink_to("overlayfs-py")
    return request.param, f"{folder}:{os.environ['PATH']}"


@contextlib.contextmanager
def called(store: Store, path: str, words: Sequence[str | Path], *, fusermount: bool = False) -> Iterator[None]:
    """Call it as engines do, from within the store, and wait for the end of standard error; unmount in the end.

    The end of standard error comes only once nobody holds it, the daemon neither.
    """
    before = _children()
    done = subprocess.run(
        words,
        cwd=store.root,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=_LIMIT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    [pid] = _children() - before
    try:
        yield
    finally:
        if fusermount:
            subprocess.run(["fusermount3", "-u", store.merged], timeout=_LIMIT, check=True)
        else:
            unmount(store.merged)
        wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)
    assert mounted_at(store.merged) is None


def _children() -> set[int]:
    """Processes that this one started or adopted, except those that have ended."""
    pids = {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    return {pid for pid in pids if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"}


def use(store: Store) -> None:
    """What shows that the whole stack is there and writable."""
    assert len(os.listdir(store.merged)) == _NAMES
    assert (store.merged / "same").read_text() == "0"
    assert (store.merged / f"layer-{_LOWERS - 1}").read_text() == str(_LOWERS - 1)
    (store.merged / "same").write_text("container")
    (store.merged / "layer-5").unlink()
    assert (store.upper / "same").read_text() == "container"


def test_podman(store: Store, engine: str, search_path: tuple[str, str]) -> None:
    name, path = search_path
    options = f"lowerdir={store.lowerdir()},upperdir={store.container}/diff,workdir={store.container}/work,,volatile,"
    options += f'context="system_u:object_r:container_file_t:s0:c1,c2",private,xino,fsync=0,{engine}'
    with called(store, path, [name, "-o", options, store.merged], fusermount=True):
        use(store)
        assert mount_flags(store.merged)[0] == "rw"


def test_podman_with_mapped_owners_kept_in_xattrs(store: Store, engine: str, search_path: tuple[str, str]) -> None:
    name, path = search_path
    options = f"lowerdir={store.lowerdir()},upperdir={store.container}/diff,workdir={store.container}/work,"
    options += f"uidmapping=:0:100000:1:1:100001:65535,gidmapping=:0:100000:65536,xattr_permissions=2,{engine}"
    with called(store, path, [name, "-o", options, store.merged]):
        use(store)
        assert (store.merged / "layer-9").stat().st_uid == 100000
        os.chown(store.merged / "layer-9", 100007, 100008)
        assert (store.merged / "layer-9").stat().st_gid == 100008
    assert os.getxattr(store.upper / "layer-9", "user.containers.override_stat").startswith(b"7:8:0644")


def test_podman_looking_at_an_image_without_an_upper(store: Store, engine: str, search_path: tuple[str, str]) -> None:
    name, path = search_path
    with called(store, path, [name, "-o", f"lowerdir={store.lowerdir()},ro,{engine}", store.merged]):
        assert (store.merged / "same").read_text() == "0"
        assert mount_flags(store.merged)[0] == "ro"


def test_buildah_overlay_volume(layers: Layers, engine: str, search_path: tuple[str, str]) -> None:
    name, path = search_path
    source = layers.add("a:volume")
    (source / "f").write_text("lower")
    content = layers.add("overlay-containers")
    for part in ("upper", "work", "merge"):
        (content / part).mkdir()
    options = f"lowerdir={str(source).replace(':', chr(92) + ':')},upperdir={content}/upper,workdir={content}/work"
    store = Store(layers.base, (), "overlay-containers")
    words: list[str | Path] = [name, "-o", f"{options},squash_to_uid=0,squash_to_gid=0,{engine}", content / "merge"]
    (content / "merged").symlink_to("merge")
    with called(store, path, words):
        assert (content / "merge" / "f").read_text() == "lower"


def test_docker_mounts_three_times_for_one_container(store: Store, engine: str, search_path: tuple[str, str]) -> None:
    name, path = search_path
    options = f"lowerdir={store.lowerdir()},upperdir={store.container}/diff,workdir={store.container}/work,{engine}"
    assert len(options) > 8500
    for round_ in range(3):
        with called(store, path, [name, "-o", options, store.merged]):
            if round_ == 0:
                use(store)
            assert (store.merged / "same").read_text() == "container"
            assert not (store.merged / "layer-5").exists()


def test_containerd_through_mount_fuse3(store: Store, engine: str, search_path: tuple[str, str]) -> None:
    name, path = search_path
    options = f"workdir={store.root}/{store.container}/work,upperdir={store.upper},lowerdir="
    options += ":".join(f"{store.root}/{link}" for link in store.links[:20]) + f",dev,suid,{engine}"
    with called(store, path, ["mount.fuse3", "overlay", store.merged, "-o", options, "-t", name]):
        assert mount_fields(store.merged)[0] == "overlay"
        assert not {"nodev", "nosuid"} & set(mount_flags(store.merged))
        assert len(os.listdir(store.merged)) == 24


def test_failure_is_one_line_and_the_end_of_standard_error(
    store: Store, engine: str, search_path: tuple[str, str]
) -> None:
    name, path = search_path
    words: list[str | Path] = [name, "-o", f"lowerdir={store.lowerdir()}:l/MISSING,{engine}", store.merged]
    done = subprocess.run(
        words, cwd=store.root, env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, timeout=_LIMIT, check=False, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "l/MISSING': No such file or directory" in done.stderr
    assert mounted_at(store.merged) is None


# Enters a user namespace with the ids of a rootless engine, then runs a shell in it.
_ROOTLESS: Final = textwrap.dedent(
    """
    import os, sys
    sys.path.insert(0, sys.argv[1])
    from tests.support.syscalls import CLONE_NEWNS, CLONE_NEWUSER, unshare
    ready, mapped = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        os.write(ready[1], b"x")
        os.read(mapped[0], 1)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.execvp("sh", ["sh", "-ec", *sys.argv[3:]])
    os.read(ready[0], 1)
    for kind in ("uid", "gid"):
        with open(f"/proc/{pid}/{kind}_map", "w") as file:
            file.write(f"0 {sys.argv[2]} 65536")
    os.write(mapped[1], b"x")
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
)


@pytest.fixture
def device_for_all(scratch: Path) -> Iterator[None]:
    """The device that udev opens to all."""
    device = scratch / "fuse"
    os.mknod(device, 0o020666, os.makedev(10, 229))
    device.chmod(0o666)
    try:
        mount(os.fsencode(device), b"/dev/fuse", None, MS_BIND)
        try:
            yield
        finally:
            umount(b"/dev/fuse")
    finally:
        device.unlink()


def test_rootless_podman_with_its_own_map(
    store: Store, engine: str, search_path: tuple[str, str], device_for_all: None
) -> None:
    name, path = search_path
    for directory in (store.root / store.container, store.upper, store.upper.parent / "work", store.merged):
        os.chown(directory, _FIRST_SUBORDINATE, _FIRST_SUBORDINATE)
    maps = ":0:1:4242:4242:0:1:4243:4243:61293"
    options = f"lowerdir={store.lowerdir()},upperdir={store.container}/diff,workdir={store.container}/work,"
    options += f"uidmapping={maps},gidmapping={maps},{engine}"
    inside = """
        "$0" -o "$1" "$2"
        for name in root user other; do stat -c %u:%g "$2/owned-by-$name"; done
        echo changed >"$2"/owned-by-user
        touch "$2"/new
        chown 4243:0 "$2"/new
        rm "$2"/layer-7
        stat -c %u:%g "$2"/new
        ls "$2" | wc -l
        umount "$2"
    """
    words: list[str | Path] = [_ROOTLESS, REPOSITORY, str(_FIRST_SUBORDINATE), inside, name, options, store.merged]
    done = subprocess.run(
        [sys.executable, "-c", *words],
        cwd=store.root, env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=_LIMIT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["1:1", "0:0", "4243:4243", "4243:0", str(_NAMES)]
    status = (store.upper / "new").stat()
    assert (status.st_uid, status.st_gid) == (_FIRST_SUBORDINATE + 4243, _FIRST_SUBORDINATE + 4242)
    # no device can be made there: the whiteout is another kind of mark
    assert sorted(os.listdir(store.upper))[-2:] == ["new", "owned-by-user"]


def test_versions_are_told_under_both_names(search_path: tuple[str, str]) -> None:
    name, path = search_path
    done = subprocess.run(
        [name, "--version"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        check=True,
    )
    assert done.stdout.count("\n") == 1 and not done.stderr
