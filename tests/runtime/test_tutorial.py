"""The tutorial does what it says."""

import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.runtime.conftest import Ovl, left_of
from tests.support.mounts import REPOSITORY

TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
LIMIT = 100  # seconds for all commands
MARK = "\1"
"""Printed between two commands."""
SHOWN = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
VARYING = [
    (r"\b[0-9a-f]{12,}\b(\.\.\.)?", "ID"),
    (r"\b[A-Z][a-z]{2} [ \d]\d \d\d:\d\d\b", "TIME"),
    (r"\b\d+ (?:seconds?|minutes?)\b", "TIME"),
    (r"\b\d+(\.\d+)?(?:[kKM]B?|B)(?!\w)", "SIZE"),
    (r"(?m)^total \d+$", "total SIZE"),
]
"""What differs from run to run."""


def steps() -> list[tuple[str, str]]:
    """Each command of the tutorial, with the output shown for it."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    found = []
    for block in blocks:
        assert block.startswith("$ "), block
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = step.partition("\n")
            found.append((command, output))
    return found


def without_what_varies(text: str) -> str:
    for pattern, name in VARYING:
        text = re.sub(pattern, name, text)
    return text


@pytest.fixture
def place(layers: Layers) -> Iterator[Path]:
    """An empty directory; the containers and the mount of a tutorial that broke off in it are removed."""
    place = layers.add("place")
    yield place
    root, mnt = place / "layers" / "store", place / "layers" / "mnt"
    if os.path.ismount(mnt):
        subprocess.run(["umount", "--lazy", mnt], check=True)
    if root.exists():
        made = Ovl(root, place, place)
        if names := [row["Id"] for row in made.rows()]:
            made.run("rm", "-f", *names)
        assert left_of(root) == []


def test_the_commands_of_the_tutorial_print_what_it_shows(place: Path) -> None:
    known = steps()
    assert len(known) > 50
    script = "".join(f"{command}\nprintf '\\1'\n" for command, _ in known)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"}
    done = subprocess.run(
        ["sh", "-c", f"exec 2>&1\n{script}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        cwd=place,
        env={name: value for name, value in environment.items() if name != "OVL_ROOT"},
        check=True,
    )
    printed = done.stdout.split(MARK)
    assert printed.pop() == ""
    checker = doctest.OutputChecker()
    for (command, shown), got in zip(known, printed, strict=True):
        assert checker.check_output(without_what_varies(shown), without_what_varies(got), SHOWN), (command, shown, got)
    assert list(place.iterdir()) == []
