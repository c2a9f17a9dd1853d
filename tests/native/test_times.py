"""Times that a change sets, and what a copy that has lost its name goes on being."""

import os
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.support.mounts import our_mount

_FILES = 100


@pytest.mark.parametrize("what", ["linked", "merged", "plain"])
def test_what_is_touched_before_others_are_made_is_older(layers: Layers, what: str) -> None:
    (layers.lower / "linked").touch()
    os.link(layers.lower / "linked", layers.lower / "other")
    for layer in (layers.lower, layers.upper):
        (layer / "merged").mkdir()
    (layers.upper / "plain").touch()
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "engine=native"):
        path = layers.mnt / what
        path.chmod(0o700)
        for number in range(_FILES):
            os.utime(path)
            touched = path.stat()
            (layers.mnt / f"made{number}").touch()
            assert (layers.mnt / f"made{number}").stat().st_mtime_ns >= touched.st_mtime_ns
            assert touched.st_mtime_ns == touched.st_atime_ns == touched.st_ctime_ns


@pytest.mark.parametrize("options", ["", ",metacopy=on", ",metacopy=on,writeback"])
@pytest.mark.parametrize("change", ["chmod", "utime", "nothing"])
def test_a_removed_file_is_changed_and_then_written(layers: Layers, options: str, change: str) -> None:
    (layers.lower / "a").write_bytes(b"content")
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, f"engine=native{options}"):
        fd = os.open(layers.mnt / "a", os.O_RDWR)
        try:
            os.unlink(layers.mnt / "a")
            if change == "chmod":
                os.fchmod(fd, 0o640)
            elif change == "utime":
                os.utime(fd, (5, 7))
            os.pwrite(fd, b"x", 0)
            os.fsync(fd)
            os.ftruncate(fd, 4)
            st = os.fstat(fd)
            assert (st.st_size, st.st_nlink) == (4, 0)
            os.fchmod(fd, 0o600)
            assert os.pread(fd, 10, 0) == b"xont"
        finally:
            os.close(fd)
        assert os.listdir(layers.mnt) == []
    assert Path(layers.lower / "a").read_bytes() == b"content"
