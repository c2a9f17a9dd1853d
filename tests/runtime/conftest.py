"""A store with one image for each test, `ovl` to run in it, and a look at what is left afterwards."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from overlayfs_py.images import Store
from tests.conftest import Layers
from tests.images.rig import load_one
from tests.runtime import image
from tests.support.mounts import REPOSITORY

LIMIT = 60  # seconds for one command
COMMAND = [sys.executable, "-c", "from overlayfs_py.cli.ovl import main; main(prog_name='ovl')"]


@dataclass(slots=True)
class Ovl:
    """The program, with a store of its own; `base` is a directory beside it."""

    root: Path
    base: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OVL_ROOT": str(self.root), "COLUMNS": "200"}

    def run(self, *words: str | Path, stdin: bytes = b"", status: int | None = 0) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end, and see that it ends with this status."""
        done = subprocess.run(
            [*COMMAND, *words], input=stdin, capture_output=True, timeout=LIMIT, env=self.environment, cwd=self.base
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
        process = subprocess.Popen([*COMMAND, *words], env=self.environment, cwd=self.base, **streams)
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
    root = layers.add("store")
    load_one(Store.open(root), layout)
    made = Ovl(root, layers.add("beside"))
    try:
        yield made
    finally:
        if names := [row["Id"] for row in made.rows()]:
            made.run("rm", "-f", "-v", *names)
    for process in made.started:
        process.wait(LIMIT)
    within(5, lambda: left_of(root) == [])
    assert left_of(root) == []


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
