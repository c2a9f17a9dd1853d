"""A Docker daemon of the test's own, with our program as its fuse-overlayfs."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engines.program import write_program
from tests.support.mounts import mounted_at
from tests.support.syscalls import umount

_PATIENCE = 30.0  # seconds until the daemon must answer or have ended


@dataclass(frozen=True, slots=True)
class Docker:
    """A daemon that serves on the socket below `base`."""

    base: Path

    def __call__(self, *arguments: str, limit: float = 110.0) -> str:
        """The standard output of a `docker` command, which ends with status 0."""
        done = subprocess.run(
            ["docker", "--host", f"unix://{self.base}/socket", *arguments],
            env=os.environ | {"HOME": str(self.base), "DOCKER_BUILDKIT": "0"},
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        assert done.returncode == 0, f"docker {' '.join(arguments)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout.strip()

    def mounts(self) -> list[str]:
        """What is mounted below the daemon's data."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in lines if f" {self.base}/data/" in line]


@contextmanager
def daemon(base: Path, driver: str = "fuse-overlayfs", *options: str) -> Iterator[Docker]:
    """dockerd with a storage driver, its data below the new directory `base`; ended and removed at the end."""
    base.mkdir()
    (base / "bin").mkdir()
    write_program(base / "bin" / "fuse-overlayfs")
    command = ["dockerd", f"--storage-driver={driver}", "--iptables=false", "--ip6tables=false", "--bridge=none"]
    command += [f"--data-root={base}/data", f"--exec-root={base}/exec", f"--pidfile={base}/pid"]
    command += [f"--host=unix://{base}/socket", f"--config-file={base}/none.json"]
    command += options
    (base / "none.json").write_text("{}")
    made = Docker(base)
    with (base / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            # Where a containerd that was slow to answer writes what it was doing.
            env=os.environ | {"PATH": f"{base}/bin:{os.environ['PATH']}", "TMPDIR": str(base)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        _wait(made, process)
        yield made
    finally:
        process.terminate()
        process.wait(_PATIENCE)
        # Docker keeps the namespaces of networks mounted there.
        for mountpoint in (base / "exec" / "netns").glob("*"):
            if mounted_at(mountpoint):
                umount(os.fsencode(mountpoint))
        left = made.mounts()
        subprocess.run(["rm", "-rf", "--one-file-system", base], check=True)
        assert not left, "\n".join(left)


def _wait(made: Docker, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not (made.base / "socket").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail((made.base / "log").read_text()[-4000:])
        time.sleep(0.05)
    made("version")
