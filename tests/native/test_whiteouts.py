"""Files that take the place of whiteouts, and whiteouts that take theirs, as the kernel's overlayfs has them."""

import os
import stat
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.support.mounts import Mount, kernel_mount, our_mount

_NAMES = ("a", "b", "c", "linked", "other", "fifo")


def lay_out(lower: Path) -> None:
    for place, mode, group in (("d", 0o755, 0), ("group", 0o2775, 77), ("acl", 0o755, 0)):
        directory = lower / place
        directory.mkdir()
        for name in _NAMES[:3]:
            (directory / name).write_text(f"{place}/{name}")
        (directory / "linked").write_text("two names")
        os.link(directory / "linked", directory / "other")
        os.mkfifo(directory / "fifo")
        os.chown(directory, 0, group)
        directory.chmod(mode)
    subprocess.run(["setfacl", "-d", "-m", "u:12:rwx,g::r-x,o::---", lower / "acl"], check=True, timeout=30)


def make(path: Path, text: str, mode: int = 0o666) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(fd, "w") as file:
        file.write(text)


def replace_all(mnt: Path) -> list[str]:
    """Remove and make again every file, three times over; what was to be seen meanwhile."""
    seen = []
    for place in ("d", "group", "acl"):
        for turn in range(3):
            for number, name in enumerate(_NAMES):
                path = mnt / place / name
                held = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                path.unlink()
                seen.append(f"{os.read(held, 100)!r} {sorted(os.listdir(path.parent))}")
                os.close(held)
                assert not os.path.lexists(path)
                if turn < 2 or number % 2:
                    make(path, f"{turn}", mode=(0o666, 0o4711, 0o600)[turn])
    return seen


def shown(top: Path) -> dict[str, tuple[object, ...]]:
    """All below a directory: type, mode, owner, links, device, and what is in it."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(top.rglob("*")):
        st = path.lstat()
        text = path.read_text() if stat.S_ISREG(st.st_mode) else None
        access = "system.posix_acl_access" in os.listxattr(path, follow_symlinks=False)
        owned = (st.st_uid, st.st_gid, st.st_rdev, access, text)
        # Whiteouts share their inodes, and how many do is nobody's concern.
        found[os.fspath(path.relative_to(top))] = (oct(st.st_mode), *owned)
    return found


def outcome(layers: Layers, mounted: Callable[..., AbstractContextManager[Mount]], umask: int) -> tuple[object, ...]:
    lay_out(layers.lower)
    before = os.umask(umask)
    try:
        with mounted(layers.mnt, [layers.lower], layers.upper, layers.work, "index=on"):
            seen = replace_all(layers.mnt)
            live = shown(layers.mnt)
    finally:
        os.umask(before)
    assert [
        name for name in os.listdir(layers.work / "work") if not (layers.work / "work" / name).is_char_device()
    ] == []
    return seen, live, shown(layers.upper), shown(layers.lower)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_removed_and_made_again_are_as_in_the_kernel(tmp_path: Path, umask: int) -> None:
    outcomes = []
    for name, mounted in (("kernel", kernel_mount), ("ours", our_mount)):
        base = tmp_path / name
        layers = Layers(base, *(base / part for part in ("lower", "upper", "work", "mnt")))
        for part in (base, layers.lower, layers.upper, layers.work, layers.mnt):
            part.mkdir()
        outcomes.append(outcome(layers, mounted, umask))
    assert outcomes[1][0] == outcomes[0][0]
    assert outcomes[1][1:] == outcomes[0][1:]


def test_work_that_hands_its_group_down_gives_it_to_nobody(layers: Layers) -> None:
    (layers.lower / "f").write_text("below")
    os.chown(layers.work, 0, 77)
    layers.work.chmod(0o2755)
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work):
        (layers.mnt / "f").unlink()
        make(layers.mnt / "f", "new")
        (layers.mnt / "f").unlink()
        make(layers.mnt / "f", "newer")
        assert (layers.mnt / "f").stat().st_gid == 0
    assert (layers.upper / "f").stat().st_gid == 0
    assert stat.S_IMODE((layers.upper / "f").stat().st_mode) == 0o644
