"""A store with one image for each test, `ovl` to run in it, and a look at what is left afterwards."""

import contextlib
import errno
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from overlayfs_py.images import Store
from tests.conftest import Checkout, Layers
from tests.images.rig import load_one
from tests.runtime import image
from tests.support.mounts import REPOSITORY
from tests.support.syscalls import MNT_DETACH, MS_BIND, mount, umount

LIMIT = 60  # seconds for one command
MODULE = ("-m", "overlayfs_py.cli.ovl")
USER = 4242


@dataclass(slots=True)
class Ovl:
    """The program, with a store of its own; `base` is a directory beside it."""

    root: Path
    base: Path
    layout: Path
    """The image, in no store."""
    command: tuple[str | Path, ...] = (sys.executable, *MODULE)
    repository: Path = REPOSITORY
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.repository), "OVL_ROOT": str(self.root), "COLUMNS": "200"}

    def run(self, *words: str | Path, stdin: bytes = b"", status: int | None = 0) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end, and see that it ends with this status."""
        done = subprocess.run(
            [*self.command, *words],
            input=stdin,
            capture_output=True,
            timeout=LIMIT,
            env=self.environment,
            cwd=self.base,
        )
        assert status is None or done.returncode == status, (words, done)
        return done

    def out(self, *words: str | Path, stdin: bytes = b"") -> str:
        """What a command that succeeds prints."""
        return self.run(*words, stdin=stdin).stdout.decode()

    def error(self, *words: str | Path, status: int) -> str:
        """The one line that a command which fails prints on standard error."""
        done = self.run(*words, status=status)
        text = done.stderr.decode()
        assert text.startswith("ovl: ") and text.count("\n") == 1 and text.endswith("\n"), text
        return text.removeprefix("ovl: ").rstrip("\n")

    def start(self, *words: str | Path, **streams: Any) -> subprocess.Popen[bytes]:
        """Start a command, whose end is awaited after the test."""
        process = subprocess.Popen([*self.command, *words], env=self.environment, cwd=self.base, **streams)
        self.started.append(process)
        return process

    def row(self, name: str) -> dict[str, Any]:
        (found,) = [row for row in self.rows() if name in (row["Name"], row["Id"])]
        return found

    def rows(self) -> list[dict[str, Any]]:
        """What `ps -a` tells."""
        rows = json.loads(self.out("ps", "-a", "--format", "json"))
        assert isinstance(rows, list)
        return rows

    def status(self, name: str) -> dict[str, Any]:
        """What is on disk of its state, which nobody has set right."""
        found: dict[str, Any] = json.loads((self.home(name) / "status.json").read_bytes())
        return found

    def home(self, name: str) -> Path:
        """The directory of a container, found without the program."""
        for home in (self.root / "containers").iterdir():
            if json.loads((home / "state.json").read_bytes())["name"] == name:
                return home
        raise AssertionError(f"no container {name}")


@pytest.fixture(scope="session")
def layout(scratch: Path) -> Path:
    """The image as an OCI layout."""
    target = scratch / "runtime" / "busy"
    image.write(target)
    return target


@pytest.fixture
def ovl(layers: Layers, layout: Path) -> Iterator[Ovl]:
    """As root, with the image in the store."""
    root = layers.add("store")
    load_one(Store.open(root), layout)
    yield from _used(Ovl(root, layers.add("beside"), layout))


@pytest.fixture
def rootless(layers: Layers, layout: Path, checkout: Checkout) -> Iterator[Ovl]:
    """As a user with subordinate ids who may open /dev/fuse, with the image in the store."""
    with _user(layers, layout, checkout, ranges="tester:200000:65536\n") as made:
        yield from _used(made)


@pytest.fixture
def alone(layers: Layers, layout: Path, checkout: Checkout) -> Iterator[Ovl]:
    """The same without subordinate ids."""
    with _user(layers, layout, checkout, ranges="") as made:
        yield from _used(made)


@contextlib.contextmanager
def _user(layers: Layers, layout: Path, checkout: Checkout, *, ranges: str) -> Iterator[Ovl]:
    etc, base = layers.add("etc"), layers.add("beside")
    os.chown(base, USER, USER)
    os.chown(layers.base, USER, USER)
    lines = {
        "passwd": f"tester:x:{USER}:{USER}::{base}:/bin/sh\n",
        "group": f"tester:x:{USER}:\n",
        "subuid": ranges,
        "subgid": ranges,
    }
    covered = [(etc / name, Path("/etc", name)) for name in lines]
    for (mine, theirs), line in zip(covered, lines.values(), strict=True):
        mine.write_text(theirs.read_text() + line)
    for name in ("fuse", "net/tun"):
        covered.append((etc / Path(name).name, Path("/dev", name)))
        os.mknod(covered[-1][0], stat.S_IFCHR, os.stat(covered[-1][1]).st_rdev)
        os.chmod(covered[-1][0], 0o666)
    user = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "env", f"HOME={base}")
    with contextlib.ExitStack() as stack:
        for mine, theirs in covered:
            mount(os.fsencode(mine), os.fsencode(theirs), None, MS_BIND)
            stack.callback(_uncover, theirs)
        made = Ovl(layers.base / "store", base, layout, (*user, checkout.python, *MODULE), checkout.path)
        made.run("load", "-i", layout)
        yield made


def _uncover(covered: Path) -> None:
    try:
        umount(os.fsencode(covered), MNT_DETACH)
    except OSError as error:
        # Where the machine is given a user meanwhile, outside, the file is another and the mount has gone with it.
        if error.errno != errno.EINVAL:
            raise


def _used(made: Ovl) -> Iterator[Ovl]:
    try:
        yield made
    finally:
        if names := [row["Id"] for row in made.rows()]:
            made.run("rm", "-f", "-v", *names)
    for process in made.started:
        process.wait(LIMIT)
    within(5, lambda: left_of(made.root) == [])
    assert left_of(made.root) == []


def within(seconds: float, done: Callable[[], bool]) -> bool:
    """Whether it comes to be in time."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def left_of(root: Path) -> list[str]:
    """The containers and mounts that a store still has."""
    homes = [*(root / "containers").iterdir(), *(root / "containers.tmp").iterdir()]
    left = [f"container {home.name}" for home in homes if home.is_dir()]
    table = Path("/proc/self/mountinfo").read_text()
    return left + [line for line in table.splitlines() if f"{root}/" in line]
