"""ACLs, with the kernel's own as the judge."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlayfs_py.core import acl
from overlayfs_py.core.acl import GROUP, GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, Entry
from tests.conftest import Layers

# The directory is shared by the examples of one test, and each cleans it.
on_disk = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])

perms = st.integers(0, 7)
modes = st.integers(0, 0o7777)
ids = st.integers(0, 2**32 - 2)
MINIMAL = (Entry(USER_OBJ, 7), Entry(GROUP_OBJ, 5), Entry(OTHER, 5))


@st.composite
def acls(draw: st.DrawFn) -> tuple[Entry, ...]:
    """Any ACL the kernel takes."""
    users = draw(st.lists(st.tuples(perms, ids), max_size=3))
    groups = draw(st.lists(st.tuples(perms, ids), max_size=3))
    masked = bool(users or groups) or draw(st.booleans())
    return (
        Entry(USER_OBJ, draw(perms)),
        *(Entry(USER, perm, number) for perm, number in users),
        Entry(GROUP_OBJ, draw(perms)),
        *(Entry(GROUP, perm, number) for perm, number in groups),
        *([Entry(MASK, draw(perms))] if masked else []),
        Entry(OTHER, draw(perms)),
    )


@pytest.fixture
def folder(layers: Layers) -> Iterator[Path]:
    """A directory in which the umask takes nothing away."""
    before = os.umask(0)
    yield layers.add("acl")
    os.umask(before)


def stored(path: Path, key: bytes = acl.ACCESS_KEY) -> bytes | None:
    """The ACL the kernel has for a file."""
    keys = [os.fsencode(name) for name in os.listxattr(path)]
    return os.getxattr(path, key) if key in keys else None


def mode_of(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


@given(entries=acls())
def test_an_acl_that_is_packed_is_parsed_again(entries: tuple[Entry, ...]) -> None:
    assert acl.parse(acl.pack(entries)) == entries


@on_disk
@given(entries=acls(), mode=st.integers(0, 0o777))
def test_a_new_file_inherits_what_the_kernel_would_give_it(folder: Path, entries: tuple[Entry, ...], mode: int) -> None:
    default = acl.pack(entries)
    os.setxattr(folder, acl.DEFAULT_KEY, default)
    os.close(os.open(folder / "file", os.O_CREAT | os.O_EXCL, mode))
    expected = mode_of(folder / "file"), stored(folder / "file")
    (folder / "file").unlink()
    assert acl.inherit(default, mode) == expected


@on_disk
@given(entries=acls(), mode=st.integers(0, 0o1777))
def test_a_new_directory_inherits_the_same_and_the_default(folder: Path, entries: tuple[Entry, ...], mode: int) -> None:
    default = acl.pack(entries)
    os.setxattr(folder, acl.DEFAULT_KEY, default)
    os.mkdir(folder / "dir", mode)
    expected = mode_of(folder / "dir"), stored(folder / "dir")
    assert stored(folder / "dir", acl.DEFAULT_KEY) == default
    (folder / "dir").rmdir()
    assert acl.inherit(default, mode) == expected


@on_disk
@given(entries=acls(), mode=modes)
def test_chmod_changes_the_acl_as_the_kernel_does(folder: Path, entries: tuple[Entry, ...], mode: int) -> None:
    (folder / "file").touch()
    os.setxattr(folder / "file", acl.ACCESS_KEY, acl.pack(entries))
    before = stored(folder / "file")
    os.chmod(folder / "file", mode)
    after = stored(folder / "file")
    (folder / "file").unlink()
    if before is not None:
        assert acl.chmod(before, mode) == after


@on_disk
@given(entries=acls())
def test_the_mode_that_goes_with_an_acl_is_the_kernels(folder: Path, entries: tuple[Entry, ...]) -> None:
    (folder / "file").touch()
    os.setxattr(folder / "file", acl.ACCESS_KEY, acl.pack(entries))
    expected = mode_of(folder / "file"), stored(folder / "file") is None
    (folder / "file").unlink()
    assert acl.equivalent_mode(entries) == expected


TAGS = st.sampled_from((USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER, 0, 0x40))


@on_disk
@given(
    entries=st.one_of(
        st.lists(st.builds(Entry, TAGS, st.integers(0, 8), st.one_of(ids, st.just(acl.UNDEFINED_ID))), max_size=6),
        acls().flatmap(lambda entries: st.permutations(entries)),
        acls().flatmap(lambda entries: st.integers(0, len(entries)).map(lambda n: entries[:n] + entries[n + 1 :])),
    )
)
def test_what_the_kernel_refuses_is_refused(folder: Path, entries: tuple[Entry, ...] | list[Entry]) -> None:
    data = acl.pack(entries)
    try:
        os.setxattr(folder, acl.DEFAULT_KEY, data)
    except OSError:
        with pytest.raises(ValueError):
            acl.parse(data)
    else:
        assert acl.parse(data) == tuple(entries)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\2\0\0",
        b"\1\0\0\0",
        b"\3\0\0\0" + acl.pack(MINIMAL)[4:],
        acl.pack(MINIMAL) + b"\0",
        acl.pack(MINIMAL)[:-1],
        b"\xff" * 28,
    ],
)
def test_junk_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        acl.parse(data)


@given(st.binary(max_size=60))
def test_no_junk_raises_anything_but_value_error(data: bytes) -> None:
    try:
        acl.parse(data)
    except ValueError:
        return
    acl.inherit(data, 0o644)
    acl.chmod(data, 0o644)


def test_a_header_alone_is_no_acl() -> None:
    assert acl.parse(acl.pack(())) == ()
    assert acl.inherit(acl.pack(()), 0o644) == (0o644, None)


def test_only_named_entries_have_their_ids_translated() -> None:
    entries = (
        Entry(USER_OBJ, 7),
        Entry(USER, 6, 10),
        Entry(GROUP_OBJ, 5),
        Entry(GROUP, 4, 20),
        Entry(MASK, 7),
        Entry(OTHER, 0),
    )
    mapped = acl.parse(acl.map_ids(acl.pack(entries), lambda uid: uid + 1, lambda gid: gid + 2))
    assert mapped == (
        Entry(USER_OBJ, 7),
        Entry(USER, 6, 11),
        Entry(GROUP_OBJ, 5),
        Entry(GROUP, 4, 22),
        Entry(MASK, 7),
        Entry(OTHER, 0),
    )
