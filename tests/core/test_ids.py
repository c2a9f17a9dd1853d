"""Owners, as the mount shows them and as the disk has them."""

import errno
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayfs_py.config import IdRange
from overlayfs_py.core.ids import (
    CONTAINERS_OVERRIDE_KEY,
    OVERFLOW_ID,
    OVERRIDE_KEYS,
    PRIVILEGED_OVERRIDE_KEY,
    USER_OVERRIDE_KEY,
    IdMap,
    Override,
    apply_override,
    format_override,
    layer_override_key,
    override_key,
    parse_override,
)

# As podman passes it to a container: root is the user, the rest are the user's subordinate ids.
CONTAINER = (IdRange(0, 1000, 1), IdRange(1, 110000, 65536))


def test_without_a_map_owners_are_what_they_are() -> None:
    ids = IdMap()
    assert ids.identity
    assert ids.uid_to_shown(4294967294) == ids.uid_to_disk(4294967294) == 4294967294
    assert ids.gid_to_shown(5) == ids.gid_to_disk(5) == 5
    assert ids.creator_to_disk(7, 8) == (7, 8)


@pytest.mark.parametrize(("disk", "shown"), [(0, 1000), (1, 110000), (2, 110001), (65536, 175535)])
def test_each_range_is_translated_both_ways(disk: int, shown: int) -> None:
    ids = IdMap(CONTAINER, CONTAINER)
    assert not ids.identity
    assert ids.uid_to_shown(disk) == ids.gid_to_shown(disk) == shown
    assert ids.uid_to_disk(shown) == ids.gid_to_disk(shown) == disk


def test_users_and_groups_have_maps_of_their_own() -> None:
    ids = IdMap((IdRange(0, 10, 1),), ())
    assert ids.uid_to_shown(0) == 10
    assert ids.gid_to_shown(0) == 0


@pytest.mark.parametrize("disk", [65537, 4294967294])
def test_an_owner_without_a_counterpart_is_shown_as_nobody(disk: int) -> None:
    assert IdMap(CONTAINER, CONTAINER).uid_to_shown(disk) == OVERFLOW_ID
    assert IdMap(CONTAINER, CONTAINER).gid_to_shown(disk) == OVERFLOW_ID


@pytest.mark.parametrize("shown", [0, 999, 1001, OVERFLOW_ID, 175536])
def test_an_owner_without_a_counterpart_is_not_stored(shown: int) -> None:
    ids = IdMap(CONTAINER, CONTAINER)
    for to_disk in (ids.uid_to_disk, ids.gid_to_disk):
        with pytest.raises(OSError) as caught:
            to_disk(shown)
        assert caught.value.errno == errno.EOVERFLOW


def test_a_creator_without_a_counterpart_is_stored_as_nobody() -> None:
    assert IdMap(CONTAINER, CONTAINER).creator_to_disk(0, 1000) == (OVERFLOW_ID, 0)


def test_squashing_shows_one_owner_and_stores_the_real_one() -> None:
    ids = IdMap(CONTAINER, CONTAINER, squash_uid=0, squash_gid=5)
    assert ids.squashes
    assert not ids.identity
    assert (ids.uid_to_shown(2), ids.gid_to_shown(70000)) == (0, 5)
    assert (ids.uid_to_disk(1000), ids.gid_to_disk(110000)) == (0, 1)


def test_users_can_be_squashed_without_groups() -> None:
    ids = IdMap(squash_uid=7)
    assert (ids.uid_to_shown(2), ids.gid_to_shown(3)) == (7, 3)


disjoint = st.lists(st.integers(1, 100), min_size=1, max_size=5).map(
    lambda counts: tuple(
        IdRange(1000 * position, 5000 - 1000 * position, count) for position, count in enumerate(counts)
    )
)


@given(ranges=disjoint, disk=st.integers(0, 6000))
def test_what_is_shown_goes_back_to_the_same_owner(ranges: tuple[IdRange, ...], disk: int) -> None:
    ids = IdMap(ranges, ranges)
    shown = ids.uid_to_shown(disk)
    if shown != OVERFLOW_ID:
        assert ids.uid_to_disk(shown) == disk
        assert ids.creator_to_disk(shown, shown) == (disk, disk)


def test_the_privileged_key_counts_before_that_of_containers_and_the_older_one() -> None:
    assert OVERRIDE_KEYS == (PRIVILEGED_OVERRIDE_KEY, CONTAINERS_OVERRIDE_KEY, USER_OVERRIDE_KEY)
    assert layer_override_key(set(OVERRIDE_KEYS)) == PRIVILEGED_OVERRIDE_KEY
    assert layer_override_key([b"user.x", USER_OVERRIDE_KEY, CONTAINERS_OVERRIDE_KEY]) == CONTAINERS_OVERRIDE_KEY
    assert layer_override_key([USER_OVERRIDE_KEY]) == USER_OVERRIDE_KEY
    assert layer_override_key([b"user.x"]) is None


def test_the_key_that_is_written_depends_on_the_option() -> None:
    assert override_key(1) == b"security.fuseoverlayfs.override_stat"
    assert override_key(2) == b"user.containers.override_stat"


@pytest.mark.parametrize(
    ("value", "override"),
    [
        (b"0:0:755", Override(0, 0, 0o755)),
        (b"1000:5:0755", Override(1000, 5, 0o755)),
        (b"0:0:4755", Override(0, 0, 0o4755)),
        (b"0:0:0100644", Override(0, 0, 0o644)),
        (b"1:2:0644:file", Override(1, 2, 0o644, stat.S_IFREG)),
        (b"1:2:1777:dir", Override(1, 2, 0o1777, stat.S_IFDIR)),
        (b"1:2:0777:symlink", Override(1, 2, 0o777, stat.S_IFLNK)),
        (b"1:2:0600:pipe", Override(1, 2, 0o600, stat.S_IFIFO)),
        (b"1:2:0600:socket", Override(1, 2, 0o600, stat.S_IFSOCK)),
        (b"1:2:0600:block-8-1", Override(1, 2, 0o600, stat.S_IFBLK, os.makedev(8, 1))),
        (b"1:2:0666:char-1-3", Override(1, 2, 0o666, stat.S_IFCHR, os.makedev(1, 3))),
        (b"1:2:0666:char-4095-1048575", Override(1, 2, 0o666, stat.S_IFCHR, os.makedev(4095, 1048575))),
        (b"1:2:0666:char-1-3-later", Override(1, 2, 0o666, stat.S_IFCHR, os.makedev(1, 3))),
        (b"1:2:0644:file:later", Override(1, 2, 0o644, stat.S_IFREG)),
        (b"4294967294:4294967294:0", Override(4294967294, 4294967294, 0)),
    ],
)
def test_an_override_is_read(value: bytes, override: Override) -> None:
    assert parse_override(value) == override


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b":",
        b"0:0",
        b"0:0:",
        b":0:755",
        b"a:0:755",
        b"0:0:855",
        b"-1:0:755",
        b" 0:0:755",
        b"0:0:755\n",
        b"0:0:755\0",
        b"0:0:0o755",
        b"1_0:0:755",
        b"4294967295:0:755",
        b"0:99999999999:755",
        b"0:0:755:",
        b"0:0:755:door",
        b"0:0:755:char",
        b"0:0:755:char-1",
        b"0:0:755:char-x-1",
        b"0:0:755:char-4096-0",
        b"0:0:755:block-1-1048576",
        b"\xff:0:755",
        "\u0661:0:755".encode(),
    ],
)
def test_junk_is_no_override(value: bytes) -> None:
    with pytest.raises(ValueError):
        parse_override(value)


@given(st.binary(max_size=40))
def test_no_junk_raises_anything_but_value_error(value: bytes) -> None:
    try:
        parse_override(value)
    except ValueError:
        return


numbers = st.integers(0, 2**32 - 2)
devices = st.builds(os.makedev, st.integers(0, 4095), st.integers(0, 2**20 - 1))
plain = st.sampled_from((None, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK))
overrides = st.one_of(
    st.builds(Override, numbers, numbers, st.integers(0, 0o7777), plain, st.just(0)),
    st.builds(
        Override, numbers, numbers, st.integers(0, 0o7777), st.sampled_from((stat.S_IFBLK, stat.S_IFCHR)), devices
    ),
)


@given(overrides)
def test_an_override_that_is_written_is_read_again(override: Override) -> None:
    assert parse_override(format_override(override)) == override


def test_an_override_is_written_as_container_engines_write_it() -> None:
    assert format_override(Override(0, 5, 0o55, stat.S_IFDIR)) == b"0:5:0055:dir"
    assert format_override(Override(0, 0, 0o4755, stat.S_IFCHR, os.makedev(1, 3))) == b"0:0:4755:char-1-3"
    assert format_override(Override(1, 2, 0o644)) == b"1:2:0644"


def test_an_override_replaces_the_permissions_and_keeps_the_type() -> None:
    assert apply_override(Override(0, 0, 0o4711), stat.S_IFDIR | 0o755, 0) == (stat.S_IFDIR | 0o4711, 0)
    device = os.makedev(8, 0)
    assert apply_override(Override(0, 0, 0), stat.S_IFBLK | 0o755, device) == (stat.S_IFBLK, device)


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_a_regular_file_can_stand_for_a_special_one(kind: int) -> None:
    device = os.makedev(1, 3) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
    override = Override(0, 0, 0o600, kind, device)
    assert apply_override(override, stat.S_IFREG | 0o755, 0) == (kind | 0o600, device)


@pytest.mark.parametrize("real", [stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO])
def test_nothing_else_can_stand_for_another_type(real: int) -> None:
    override = Override(0, 0, 0o600, stat.S_IFCHR, os.makedev(1, 3))
    assert apply_override(override, real | 0o755, 0) == (real | 0o600, 0)
    for kind in (stat.S_IFDIR, stat.S_IFLNK):
        assert apply_override(Override(0, 0, 0o600, kind), stat.S_IFREG | 0o755, 0) == (stat.S_IFREG | 0o600, 0)
