"""What the overlay does by its options: redirects, metacopies, hard links, inode numbers, marks, xattrs."""

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.options.rig import error_of, holds_data, mounted, overlay_marks, python_as
from tests.support.mounts import kernel_mount, our_mount
from tests.support.syscalls import mount, umount
from tests.support.trees import ACL_ACCESS, ACL_DEFAULT, acl, compare_trees, read_tree, show_tree


def a_merged_directory(layers: Layers) -> None:
    (layers.lower / "d" / "sub").mkdir(parents=True)
    (layers.lower / "d" / "f").write_text("lower")
    (layers.lower / "e").mkdir()


# redirect_dir


def test_a_lower_directory_moves_by_a_redirect(layers: Layers, engine: str) -> None:
    a_merged_directory(layers)
    started = time.time_ns()
    with mounted(layers, engine):
        os.rename(layers.mnt / "d", layers.mnt / "moved")
        os.rename(layers.mnt / "moved" / "sub", layers.mnt / "moved" / "sub2")
        assert (layers.mnt / "moved" / "f").read_text() == "lower"
        ours = read_tree(os.fsencode(layers.mnt), started)
    assert overlay_marks(layers.upper / "moved")["trusted.overlay.redirect"] == b"d"
    options = "redirect_dir=on"
    with kernel_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options):
        kernels = read_tree(os.fsencode(layers.mnt), started)
    assert not compare_trees(ours, kernels), f"{show_tree(ours)}\n\n{show_tree(kernels)}"
    with mounted(layers, "redirect_dir=follow", engine):
        assert (layers.mnt / "moved" / "f").read_text() == "lower"
        assert os.listdir(layers.mnt / "moved" / "sub2") == []
        assert error_of(lambda: os.rename(layers.mnt / "e", layers.mnt / "e2")) == errno.EXDEV
    with mounted(layers, "redirect_dir=nofollow", engine):
        assert sorted(os.listdir(layers.mnt)) == ["e", "moved"]
        assert error_of(lambda: os.listdir(layers.mnt / "moved")) == errno.EPERM


@pytest.mark.parametrize("redirects", ["off", "nofollow"])
def test_without_redirects_a_lower_directory_stays_and_mv_copies(layers: Layers, engine: str, redirects: str) -> None:
    a_merged_directory(layers)
    with mounted(layers, f"redirect_dir={redirects}", engine):
        assert error_of(lambda: os.rename(layers.mnt / "d", layers.mnt / "moved")) == errno.EXDEV
        assert sorted(os.listdir(layers.mnt / "d")) == ["f", "sub"]
        (layers.mnt / "new").mkdir()
        os.rename(layers.mnt / "new", layers.mnt / "new2")
        os.rename(layers.mnt / "d" / "f", layers.mnt / "new2" / "f")
        assert (layers.mnt / "new2" / "f").read_text() == "lower"
    assert not overlay_marks(layers.upper / "new2").get("trusted.overlay.redirect")


# metacopy


def test_a_metacopy_holds_no_data_until_it_is_written(layers: Layers, engine: str) -> None:
    for name in ("mode", "owner", "times", "xattr", "written", "emptied"):
        (layers.lower / name).write_bytes(b"x" * 70000)
    with mounted(layers, "metacopy=on", engine):
        (layers.mnt / "mode").chmod(0o600)
        os.chown(layers.mnt / "owner", 7, 8)
        os.utime(layers.mnt / "times", (1, 2))
        os.setxattr(layers.mnt / "xattr", "user.key", b"value")
        (layers.mnt / "written").chmod(0o600)
        (layers.mnt / "emptied").chmod(0o600)
        for name in ("mode", "owner", "times", "xattr", "written", "emptied"):
            assert not holds_data(layers.upper / name), name
            assert "trusted.overlay.metacopy" in overlay_marks(layers.upper / name), name
            assert (layers.upper / name).stat().st_size == 70000
            assert (layers.mnt / name).read_bytes() == b"x" * 70000
            assert (layers.mnt / name).stat().st_blocks * 512 >= 70000
        with (layers.mnt / "written").open("r+b") as file:
            file.seek(10)
            file.write(b"new")
        os.truncate(layers.mnt / "emptied", 0)
        assert (layers.mnt / "written").read_bytes() == b"x" * 10 + b"new" + b"x" * 69987
    assert (layers.upper / "written").read_bytes() == b"x" * 10 + b"new" + b"x" * 69987
    assert (layers.upper / "emptied").stat().st_size == 0
    for name in ("written", "emptied"):
        assert "trusted.overlay.metacopy" not in overlay_marks(layers.upper / name)
    with kernel_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "metacopy=on"):
        assert (layers.mnt / "mode").read_bytes() == b"x" * 70000
        assert (layers.mnt / "owner").stat().st_uid == 7
    with mounted(layers, "metacopy=off,redirect_dir=on", engine):
        # those that are there are still read
        assert (layers.mnt / "mode").read_bytes() == b"x" * 70000


def test_without_metacopies_a_change_of_mode_copies_the_data(layers: Layers, engine: str) -> None:
    (layers.lower / "a").write_bytes(b"x" * 70000)
    with mounted(layers, "metacopy=off", engine):
        (layers.mnt / "a").chmod(0o600)
        assert (layers.upper / "a").read_bytes() == b"x" * 70000
        assert "trusted.overlay.metacopy" not in overlay_marks(layers.upper / "a")


# index


def test_hard_links_stay_together_with_an_index(layers: Layers, engine: str) -> None:
    (layers.lower / "a").write_text("lower")
    (layers.lower / "b").hardlink_to(layers.lower / "a")
    with mounted(layers, "index=on", engine):
        before = (layers.mnt / "a").stat().st_ino
        (layers.mnt / "a").write_text("changed")
        assert (layers.mnt / "b").read_text() == "changed"
        assert [(layers.mnt / name).stat().st_ino for name in "ab"] == [before] * 2
    with mounted(layers, engine):
        assert (layers.mnt / "b").read_text() == "changed"
        assert [(layers.mnt / name).stat().st_ino for name in "ab"] == [before] * 2
        assert (layers.mnt / "b").stat().st_nlink == 2
    with kernel_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "index=on"):
        assert (layers.mnt / "b").read_text() == "changed"


def test_a_read_only_mount_shows_the_hard_links_of_the_index_and_changes_none(layers: Layers, engine: str) -> None:
    (layers.lower / "a").write_text("lower")
    for name in "bc":
        (layers.lower / name).hardlink_to(layers.lower / "a")
    with mounted(layers, "index=on", engine):
        (layers.mnt / "a").write_text("changed")
        (layers.mnt / "new").hardlink_to(layers.mnt / "b")
        (layers.mnt / "c").unlink()
    before = sorted(path.name for path in layers.work.rglob("*"))
    with mounted(layers, "ro", engine):
        seen = [(layers.mnt / name).stat() for name in ("a", "b", "new")]
        assert {(st.st_ino, st.st_nlink) for st in seen} == {(seen[0].st_ino, 3)}
        assert (layers.mnt / "b").read_text() == "changed"
        assert not (layers.mnt / "c").exists()
    assert sorted(path.name for path in layers.work.rglob("*")) == before
    with mounted(layers, "ro,index=off", engine):
        assert [(layers.mnt / name).read_text() for name in "ab"] == ["changed", "lower"]


def test_hard_links_break_without_an_index(layers: Layers, engine: str) -> None:
    (layers.lower / "a").write_text("lower")
    (layers.lower / "b").hardlink_to(layers.lower / "a")
    with mounted(layers, "index=off", engine):
        (layers.mnt / "a").write_text("changed")
        assert (layers.mnt / "b").read_text() == "lower"
        assert (layers.mnt / "a").stat().st_ino != (layers.mnt / "b").stat().st_ino
    assert not (layers.work / "index").exists() or os.listdir(layers.work / "index") == []
    with mounted(layers, "index=off", engine):
        assert [(layers.mnt / name).read_text() for name in "ab"] == ["changed", "lower"]
        assert (layers.mnt / "a").stat().st_ino != (layers.mnt / "b").stat().st_ino


# xino, ino32_t


@pytest.fixture
def two_filesystems(layers: Layers) -> Iterator[list[Path]]:
    """Two lower layers on a tmpfs each, with the same inode numbers."""
    lowers = [layers.add("one"), layers.add("two")]
    made: list[Path] = []
    try:
        for lower in lowers:
            mount(b"tmpfs", os.fsencode(lower), b"tmpfs")
            made.append(lower)
            (lower / "merged").mkdir()
            for number in range(8):
                (lower / f"{lower.name}-{number}").write_text("")
                (lower / "merged" / f"{lower.name}-{number}").write_text("")
        assert lowers[0].joinpath("one-3").stat().st_ino == lowers[1].joinpath("two-3").stat().st_ino
        yield lowers
    finally:
        for lower in made:
            umount(os.fsencode(lower))


def numbers(root: Path) -> dict[str, int]:
    """The inode number of everything below `root`; those that listing a directory tells are the same."""
    found = {}
    for directory, _, _ in os.walk(root):
        for entry in os.scandir(directory):
            status = entry.stat(follow_symlinks=False)
            assert status.st_dev == root.stat().st_dev
            assert entry.inode() == status.st_ino
            found[os.path.relpath(entry.path, root)] = status.st_ino
    return found


@pytest.mark.parametrize("option", ["xino=on", "xino=off", "ino32_t"])
def test_inode_numbers_are_unique_and_stay(
    layers: Layers, two_filesystems: list[Path], engine: str, option: str
) -> None:
    (layers.upper / "own").write_text("")
    with our_mount(layers.mnt, two_filesystems, layers.upper, layers.work, f"{option},{engine}"):
        before = numbers(layers.mnt)
        assert len(set(before.values())) == len(before) == 34
        assert max(before.values()) < (2**32 if option == "ino32_t" else 2**64)
        (layers.mnt / "one-3").write_text("changed")
        (layers.mnt / "merged" / "two-3").chmod(0o600)
        (layers.mnt / "new").write_text("")
        after = numbers(layers.mnt)
    new = after.pop("new")
    assert after == before
    assert new not in before.values()
    with our_mount(layers.mnt, two_filesystems, layers.upper, layers.work, f"{option},{engine}"):
        again = numbers(layers.mnt)
    del again["new"]
    # tmpfs has no UUID by which a copy could name the file it is of
    for copied in ("one-3", "merged/two-3"):
        assert again.pop(copied) not in again.values()
        del before[copied]
    assert again == before


# userxattr


def test_marks_are_user_xattrs_that_the_kernel_reads(layers: Layers, engine: str) -> None:
    (layers.lower / "d").mkdir()
    (layers.lower / "d" / "old").write_text("")
    (layers.lower / "gone").write_text("")
    (layers.lower / "f").write_text("lower")
    (layers.lower / "moves").mkdir()
    started = time.time_ns()
    with mounted(layers, "userxattr", engine):
        (layers.mnt / "d" / "old").unlink()
        (layers.mnt / "d").rmdir()
        (layers.mnt / "d").mkdir()
        (layers.mnt / "d" / "new").write_text("")
        (layers.mnt / "gone").unlink()
        (layers.mnt / "f").write_text("upper")
        assert error_of(lambda: os.rename(layers.mnt / "moves", layers.mnt / "moved")) == errno.EXDEV
        assert os.listxattr(layers.mnt / "d") == []
        ours = read_tree(os.fsencode(layers.mnt), started)
    assert overlay_marks(layers.upper / "d")["user.overlay.opaque"] == b"y"
    assert "user.overlay.origin" in overlay_marks(layers.upper / "f")
    for path in layers.upper.rglob("*"):
        assert not [name for name in overlay_marks(path) if name.startswith("trusted.")]
    with kernel_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "userxattr"):
        kernels = read_tree(os.fsencode(layers.mnt), started)
    assert not compare_trees(ours, kernels), f"{show_tree(ours)}\n\n{show_tree(kernels)}"


def test_marks_of_the_kernel_in_user_xattrs_are_read(layers: Layers, engine: str) -> None:
    (layers.lower / "d").mkdir()
    (layers.lower / "d" / "old").write_text("")
    with kernel_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "userxattr"):
        (layers.mnt / "d" / "old").unlink()
        (layers.mnt / "d").rmdir()
        (layers.mnt / "d").mkdir()
    with mounted(layers, "userxattr", engine):
        assert os.listdir(layers.mnt / "d") == []
    with mounted(layers, engine):
        # not the marks of this mount, which shows them as what they are
        assert os.listdir(layers.mnt / "d") == ["old"]
        assert "user.overlay.opaque" in os.listxattr(layers.mnt / "d")


def test_redirects_in_user_xattrs_are_followed_where_asked_for(layers: Layers, engine: str) -> None:
    a_merged_directory(layers)
    with mounted(layers, "userxattr,redirect_dir=on", engine):
        os.rename(layers.mnt / "d", layers.mnt / "moved")
    assert overlay_marks(layers.upper / "moved")["user.overlay.redirect"] == b"d"
    with mounted(layers, "userxattr,redirect_dir=follow", engine):
        assert (layers.mnt / "moved" / "f").read_text() == "lower"


# static_nlink, noacl, noxattrs


def test_directories_count_their_links_unless_that_is_static(layers: Layers, engine: str) -> None:
    (layers.lower / "merged").mkdir()
    (layers.upper / "merged").mkdir()
    (layers.lower / "pure" / "x").mkdir(parents=True)
    (layers.lower / "pure" / "y").mkdir()
    (layers.lower / "file").write_text("")
    (layers.lower / "same").hardlink_to(layers.lower / "file")
    with mounted(layers, engine):
        # 1, as in other filesystems, says that nothing is known
        assert [(layers.mnt / name).stat().st_nlink for name in ("merged", "pure", "file")] == [1, 4, 2]
    with mounted(layers, "static_nlink", engine):
        assert [(layers.mnt / name).stat().st_nlink for name in ("merged", "pure", "file")] == [1, 1, 2]
        (layers.mnt / "new" / "sub").mkdir(parents=True)
        assert (layers.mnt / "new").stat().st_nlink == 1
        assert layers.mnt.stat().st_nlink == 1


_EVERYONE = 2**32 - 1
_FOR_USER_42 = acl((1, 6, _EVERYONE), (2, 4, 42), (4, 0, _EVERYONE), (16, 4, _EVERYONE), (32, 0, _EVERYONE))


def test_acls_can_be_left_out(layers: Layers, engine: str) -> None:
    (layers.lower / "f").write_text("")
    (layers.lower / "f").chmod(0o640)
    (layers.lower / "d").mkdir()
    os.setxattr(layers.lower / "f", ACL_ACCESS, _FOR_USER_42)
    os.setxattr(layers.lower / "d", ACL_DEFAULT, _FOR_USER_42)
    reads = "os.open(sys.argv[1], os.O_RDONLY); print('opened')"
    with mounted(layers, engine):
        assert os.getxattr(layers.mnt / "f", ACL_ACCESS) == _FOR_USER_42
        assert python_as(42, reads, layers.mnt / "f") == "opened"
        assert python_as(43, reads, layers.mnt / "f") == "EACCES"
    with mounted(layers, "noacl", engine):
        assert python_as(42, reads, layers.mnt / "f") == "EACCES"
        assert os.listxattr(layers.mnt / "f") == []
        assert error_of(lambda: os.getxattr(layers.mnt / "f", ACL_ACCESS)) == errno.EOPNOTSUPP
        assert error_of(lambda: os.setxattr(layers.mnt / "f", ACL_ACCESS, _FOR_USER_42)) == errno.EOPNOTSUPP
        os.setxattr(layers.mnt / "f", "user.key", b"value")
        (layers.mnt / "d" / "new").write_text("")
        assert (layers.mnt / "d" / "new").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_xattrs_can_be_left_out(layers: Layers, engine: str) -> None:
    (layers.lower / "f").write_text("")
    (layers.lower / "d").mkdir()
    (layers.lower / "d" / "old").write_text("")
    os.setxattr(layers.lower / "f", "user.key", b"value")
    with mounted(layers, "noxattrs", engine):
        assert error_of(lambda: os.getxattr(layers.mnt / "f", "user.key")) == errno.EOPNOTSUPP
        assert error_of(lambda: os.setxattr(layers.mnt / "f", "user.key", b"")) == errno.EOPNOTSUPP
        assert error_of(lambda: os.removexattr(layers.mnt / "f", "user.key")) == errno.EOPNOTSUPP
        assert error_of(lambda: os.listxattr(layers.mnt / "f")) in (0, errno.EOPNOTSUPP)
        assert error_of(lambda: os.setxattr(layers.mnt / "f", ACL_ACCESS, _FOR_USER_42)) == errno.EOPNOTSUPP
        os.rename(layers.mnt / "d", layers.mnt / "moved")
        (layers.mnt / "f").chmod(0o600)
    # those of the layers are kept, and the marks written, all the same
    assert os.getxattr(layers.upper / "f", "user.key") == b"value"
    with mounted(layers, "noxattrs=0", engine):
        assert os.getxattr(layers.mnt / "f", "user.key") == b"value"
        assert os.listdir(layers.mnt / "moved") == ["old"]
