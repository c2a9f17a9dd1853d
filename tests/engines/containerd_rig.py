"""A containerd of its own, with our snapshotter beside its own overlayfs one, and an image unpacked in both."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.drivers.rig import Process, snapshotter
from tests.engines.image import TAG, make_image
from tests.engines.program import write_program
from tests.support.mounts import unmount
from tests.support.syscalls import mount
from tests.support.trees import Tree, clock, read_tree

OURS: Final = "overlayfs-py"
THEIRS: Final = "overlayfs"
IMAGE: Final = f"example.org/image:{TAG}"
_LIMIT: Final = 60.0  # seconds, for one command

_CONFIG: Final = """version = 2
root = "{base}/root"
state = "{base}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]

[grpc]
  address = "{base}/c.sock"

[plugins."io.containerd.internal.v1.opt"]
  path = "{base}/opt"

[proxy_plugins.overlayfs-py]
  type = "snapshot"
  address = "{address}"
"""


def chain(layout: Path) -> str:
    """The chain ID of all layers of the image in an OCI layout; see "Layer ChainID" in the image specification."""

    def blob(descriptor: dict[str, str]) -> Any:
        return json.loads((layout / "blobs" / descriptor["digest"].replace(":", "/")).read_text())

    (manifest,) = json.loads((layout / "index.json").read_text())["manifests"]
    first, *others = blob(blob(manifest)["config"])["rootfs"]["diff_ids"]
    for diff in others:
        first = f"sha256:{hashlib.sha256(f'{first} {diff}'.encode()).hexdigest()}"
    return str(first)


@dataclass
class Containerd:
    """A running containerd; `since` is when it was started, in nanoseconds since the epoch."""

    base: Path
    snapshotter: Process
    since: int = field(default_factory=time.time_ns)
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        programs = self.base / "bin"
        if not programs.exists():
            programs.mkdir()
            write_program(programs / "overlayfs-py")
            config = _CONFIG.format(base=self.base, address=self.snapshotter.address)
            (self.base / "config.toml").write_text(config)
        with (self.base / "containerd.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["containerd", "--config", str(self.base / "config.toml")],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + _LIMIT
        while self.run("version", check=False).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"containerd does not answer:\n{(self.base / 'containerd.log').read_text()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End the containers that are left, and then the daemon."""
        if self.process.poll() is None:
            for namespace in self.ctr("namespaces", "ls", "-q").split():
                for container in self.ctr("-n", namespace, "containers", "ls", "-q").split():
                    self.run("-n", namespace, "task", "rm", "-f", container, check=False)
                    self.run("-n", namespace, "container", "rm", container, check=False)
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(_LIMIT)

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """Call ctr; an error shows what it said."""
        done = subprocess.run(
            ["ctr", "--address", str(self.base / "c.sock"), *arguments],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LIMIT,
        )
        assert not check or done.returncode == 0, f"ctr {arguments}: {done.stderr!r}"
        return done

    def ctr(self, *arguments: str) -> str:
        """What ctr answers."""
        return self.run(*arguments).stdout.decode()

    def load(self, kind: str, namespace: str = "default") -> None:
        """Import the image and unpack it in one of the snapshotters."""
        layout = self.base / "layout"
        if not layout.exists():
            make_image(layout)
        self.take(layout, kind, IMAGE, namespace)

    def take(self, layout: Path, kind: str, image: str, namespace: str = "default") -> str:
        """Import the image of an OCI layout and unpack it in one of the snapshotters; the snapshot of its top layer."""
        archive = self.base / "archive.tar"
        subprocess.run(["tar", "-C", layout, "-cf", archive, "."], check=True)
        name = image.partition(":")[0]
        self.ctr("-n", namespace, "image", "import", "--base-name", name, "--snapshotter", kind, str(archive))
        archive.unlink()
        return chain(layout)

    def container(self, kind: str, name: str, script: str, *options: str) -> str:
        """Run a shell script in a container that is removed at its end; what it prints."""
        words = ("run", "--rm", *self._options(kind, *options), IMAGE, name, "/bin/sh", "-c", script)
        done = self.run(*words, check=False)
        # A shim may reap the mount helper before it waits for it, tries ten times, and gives up.
        if b"failed with ECHILD" in done.stderr:
            self.run("container", "rm", name, check=False)
            done = self.run(*words, check=False)
        assert done.returncode == 0, f"ctr {words}: {done.stderr!r}"
        return done.stdout.decode()

    @contextlib.contextmanager
    def living(self, kind: str, name: str, image: str = IMAGE) -> Iterator[Path]:
        """A container that waits; its root as the host sees it."""
        self.ctr("run", "--detach", *self._options(kind), image, name, "/bin/sleep", "1000")
        try:
            yield self.base / "state" / "io.containerd.runtime.v2.task" / "default" / name / "rootfs"
        finally:
            # Ended by the test itself, perhaps.
            self.run("task", "rm", "--force", name, check=False)
            self.ctr("container", "rm", name)

    def exec(self, name: str, script: str) -> str:
        """Run a shell script in a container that lives; what it prints."""
        return self.ctr("task", "exec", "--exec-id", f"exec-{time.time_ns()}", name, "/bin/sh", "-c", script)

    def end(self, name: str) -> None:
        """End a container's process and unmount its root; its snapshot stays."""
        self.ctr("task", "rm", "--force", name)

    def start_again(self, name: str) -> None:
        """Run a container that was ended, on the snapshot it had."""
        self.ctr("task", "start", "--detach", name)

    def snapshots(self, kind: str, *arguments: str) -> str:
        """Call ctr about the snapshots of one snapshotter."""
        return self.ctr("snapshots", "--snapshotter", kind, *arguments)

    def tree(self, kind: str, key: str) -> Tree:
        """What a committed snapshot shows when it is mounted as containerd says.

        The view it takes is collected by containerd, at any moment: nothing refers to it. Mounted are its parents.
        """
        target = self.base / "mnt"
        target.mkdir(exist_ok=True)
        command = self.snapshots(kind, "view", "--target", str(target), f"view-{key}", key).split()
        assert command[:2] == ["mount", "-t"] and command[5] == "-o", command
        helper, _, subtype = command[2].rpartition(".")
        source, options = command[3], command[6]
        # mount(8) would look for our program on another PATH than containerd does.
        words = [f"mount.{helper}" if helper else "mount", source, str(target), "-o", options, "-t", subtype]
        subprocess.run(words, env=self._environment(), check=True, timeout=_LIMIT)
        try:
            return read_tree(os.fsencode(target), self.since)
        finally:
            unmount(target)

    def archive(self, kind: str, key: str) -> bytes:
        """The changes of a snapshot as a compressed archive: a layer of an image."""
        return self.run("snapshots", "--snapshotter", kind, "diff", key).stdout

    def difference(self, kind: str, key: str) -> dict[str, tuple[object, ...]]:
        """What the archive of the changes of a snapshot holds, by name."""
        archive = self.archive(kind, key)
        found: dict[str, tuple[object, ...]] = {}
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                opened = tar.extractfile(member) if member.isreg() else None
                digest = hashlib.sha256(opened.read()).hexdigest() if opened else ""
                time_ = clock(int(member.mtime * 1_000_000_000), self.since)
                xattrs = tuple(
                    sorted(item for item in member.pax_headers.items() if item[0].startswith("SCHILY.xattr"))
                )
                owner = (member.uid, member.gid)
                found[member.name] = (member.type, member.mode, *owner, member.linkname, digest, time_, xattrs)
        return found

    def collect(self) -> None:
        """Have containerd remove what nothing refers to, and wait for it."""
        self.ctr("leases", "rm", "--sync", self.ctr("leases", "create").strip())

    def release(self, kind: str, key: str) -> None:
        """Let go of a snapshot that ctr committed, which containerd then removes."""
        self.snapshots(kind, "label", key, "containerd.io/gc.root=")
        self.collect()

    def mounts(self) -> list[str]:
        """The mounts below its directory."""
        table = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in table if f"{self.base}/" in line.split(" - ")[0]]

    def restart_snapshotter(self, number: signal.Signals) -> None:
        """End our snapshotter by a signal and start it again, until containerd reaches it."""
        self.snapshotter.stop(number)
        self.snapshotter.start()
        deadline = time.monotonic() + _LIMIT
        # Its connection waits up to three seconds before it tries again.
        while self.run("snapshots", "--snapshotter", OURS, "ls", check=False).returncode != 0:
            assert time.monotonic() < deadline, "containerd does not reach the snapshotter that was started again"
            time.sleep(0.1)

    def _environment(self) -> dict[str, str]:
        # ctr mounts as well, to look at the users of an image.
        return {**os.environ, "PATH": f"{self.base / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(self.base)}

    def _options(self, kind: str, *options: str) -> tuple[str, ...]:
        # Without a cgroup: that of its namespace would stay.
        return ("--cgroup", "", "--snapshotter", kind, "--runc-binary", "runc", *options)


@contextlib.contextmanager
def containerd(base: Path) -> Iterator[Containerd]:
    """A containerd below `base`, a new directory, with the image in both snapshotters."""
    # Whatever the configuration says, shims and ctr keep their sockets below /run/containerd.
    mount(b"tmpfs", b"/run", b"tmpfs")
    base.mkdir()
    try:
        with snapshotter(base) as ours:
            running = Containerd(base, ours)
            running.start()
            try:
                running.load(OURS)
                running.load(THEIRS)
                yield running
            finally:
                running.stop()
    finally:
        unmount("/run")
        subprocess.run(["rm", "-rf", "--one-file-system", base], check=True)
