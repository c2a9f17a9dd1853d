"""A large file that several processes write while it is copied up: every page is what was written last."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.crash import pages
from tests.support.mounts import REPOSITORY, our_mount

PAGES = 90 * 256
WRITERS = (("mmap", 0), ("pwrite", 1), ("mmap", 2), ("pwrite", 3))
STEP = 67  # each writer takes every 67th page: about 340 of them, spread over the file
ROUNDS = 3
LIMIT = 100


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.crash.pages", *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def original(scratch: Path) -> Path:
    path = scratch / "pages"
    pages.make(str(path), PAGES)
    return path


@pytest.mark.parametrize("options", ["", "metacopy=on", "writeback=1"])
def test_every_page_is_what_was_written_last(layers: Layers, original: Path, options: str) -> None:
    os.link(original, layers.lower / "file")
    file, over = layers.mnt / "file", layers.base / "over"
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options):
        if options == "metacopy=on":
            os.chmod(file, 0o600)
        watchers = [start("watch", file, PAGES, over) for _ in range(2)]
        for watcher in watchers:
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == "ready\n"
        writers = [start("write", file, how, first, STEP, ROUNDS, PAGES) for how, first in WRITERS]
        for process in writers:
            assert process.wait(LIMIT) == 0, process.communicate()
        over.touch()
        for process in watchers:
            assert process.wait(LIMIT) == 0, process.communicate()
        for process in (*writers, *watchers):
            process.communicate()
        expected = {number: ROUNDS for _, first in WRITERS for number in range(first, PAGES, STEP)}
        assert pages.check(str(file), expected, PAGES) == []
    assert pages.check(str(layers.upper / "file"), expected, PAGES) == []
    assert pages.check(str(layers.lower / "file"), {}, PAGES) == []
