"""Stores of podman and buildah in a scratch directory, each with configuration files of its own."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.engines.image import TAG
from tests.engines.program import write_program
from tests.support.mounts import connections_made, mounted_at
from tests.support.trees import Tree, read_tree

IMAGE: Final = f"localhost/image:{TAG}"
_CONTAINERS: Final = """[containers]
default_ulimits=["nofile=1024:1024","nproc=1024:1024"]
netns="none"
[engine]
cgroup_manager="cgroupfs"
events_logger="file"
runtime="runc"
lock_type="file"
tmp_dir="{base}/tmp"
"""


@dataclass(slots=True)
class Store:
    """One store and the programs that work on it; `user` is what goes before them to run them as another user."""

    base: Path
    user: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, limit: float = 110.0, fails: bool = False) -> str:
        """The standard output of a program that works on this store, and that ends with status 0 unless it `fails`."""
        done = subprocess.run(
            [*self.user, *command],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        said = f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert (done.returncode != 0) is fails, said
        return done.stdout.strip()

    def podman(self, *arguments: str, limit: float = 110.0) -> str:
        return self.run("podman", *arguments, limit=limit)

    def inside(self, name: str, script: str, *options: str, image: str = IMAGE) -> str:
        """What a script prints in a new container, which is stopped then but stays.

        Without privilege, `podman run` in the foreground takes 20 seconds longer: "Exceeded conmon timeout".
        """
        self.podman("run", "--detach", "--name", name, *options, image, "sleep", "1000")
        said = self.podman("exec", name, "sh", "-c", script)
        self.podman("stop", "--time", "0", name)
        return said

    def pull(self, layout: Path, name: str = IMAGE) -> None:
        """Take the image of an OCI layout in, under a name."""
        found = self.podman("pull", "--quiet", f"oci:{layout}:{TAG}")
        self.podman("tag", found, name)

    def tree_of(self, image: str, since: int) -> Tree:
        """What an image holds, read through a mount of it."""
        path = self.podman("image", "mount", image)
        try:
            return read_tree(os.fsencode(path), since)
        finally:
            self.podman("image", "unmount", image)

    def note_connections(self, mountpoint: str) -> None:
        """Have the end of the run look whether the connection of a mount is gone."""
        device = mounted_at(mountpoint)
        assert device is not None
        connections_made.add(device.partition(":")[2])

    def prune_to_nothing(self) -> None:
        """Prune all that is not in use, and see that no container, image, volume, layer or daemon is left."""
        self.podman("system", "prune", "--all", "--force", "--volumes")
        for what in ("ps --all", "images --all", "volume ls"):
            assert self.podman(*what.split(), "--quiet") == ""
        assert self.left() == []
        found = subprocess.run(["pgrep", "--full", f"{self.base}/store"], capture_output=True, text=True, check=False)
        assert found.stdout == ""

    def left(self) -> list[str]:
        """Mounts below the store and what an empty store must not have."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        # The store itself is bound to itself by podman, so that its mounts stay private.
        found = [line for line in lines if f" {self.base}/" in line and f" {self.base}/store/overlay " not in line]
        for name in ("overlay-containers", "overlay-images", "overlay-layers", "vfs-containers"):
            found += [str(path) for path in (self.base / "store" / name).glob("*") if path.is_dir()]
        found += [str(path) for path in (self.base / "store" / "overlay").glob("[!l.]*")]
        return found


@contextmanager
def store(base: Path, driver: str = "ours") -> Iterator[Store]:
    """A fresh store below the new directory `base`, all of it removed at the end.

    `driver` is "ours", "fuse-overlayfs", "overlay" (the kernel's) or "vfs".
    """
    base.mkdir()
    program = write_program(base / "overlayfs-py") if driver == "ours" else Path("/usr/bin/fuse-overlayfs")
    made = configure(base, driver, program)
    try:
        yield made
    finally:
        clear(made)


def choose(base: Path, driver: str, program: Path) -> None:
    """Have the store below a directory use a driver, from the next command on."""
    settings = f'[storage]\ndriver="{"vfs" if driver == "vfs" else "overlay"}"\n'
    settings += f'runroot="{base}/run"\ngraphroot="{base}/store"\nrootless_storage_path="{base}/store"\n'
    if driver in ("ours", "fuse-overlayfs"):
        settings += f'[storage.options.overlay]\nmount_program="{program}"\n'
    (base / "storage.conf").write_text(settings)


def configure(base: Path, driver: str, program: Path, user: tuple[str, ...] = ()) -> Store:
    """Write the files that make a directory a store."""
    choose(base, driver, program)
    (base / "containers.conf").write_text(_CONTAINERS.format(base=base))
    (base / "TMPDIR").mkdir()
    environment = {
        "CONTAINERS_STORAGE_CONF": f"{base}/storage.conf",
        "CONTAINERS_CONF": f"{base}/containers.conf",
        "TMPDIR": f"{base}/TMPDIR",
        "BUILDAH_ISOLATION": "oci",
    }
    return Store(base, user, environment)


def clear(made: Store) -> None:
    """Remove all that a store holds, and the store."""
    made.podman("rm", "--all", "--force", "--time", "0")
    made.podman("rmi", "--all", "--force")
    made.podman("volume", "prune", "--force")
    if mounted_at(made.base / "store" / "overlay"):
        subprocess.run(["umount", made.base / "store" / "overlay"], check=True)
    left = made.left()
    assert not left, "\n".join(["left in the store:", *left])
    if made.user:
        # Ends the process that keeps the user namespace.
        made.podman("system", "migrate")
    subprocess.run(["rm", "-rf", "--one-file-system", made.base], check=True)
