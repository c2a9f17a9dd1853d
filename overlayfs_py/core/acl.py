"""POSIX access control lists as xattr values hold them; pure.

The behaviour is the kernel's (fs/posix_acl.c), for what it leaves to the server of a filesystem. The format is version
2 of linux/posix_acl_xattr.h: a little-endian version number, then eight bytes an entry. See acl(5) for the words.
"""

from __future__ import annotations

import struct

from overlayfs_py.records import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ACCESS_KEY = b"system.posix_acl_access"
DEFAULT_KEY = b"system.posix_acl_default"

USER_OBJ = 0x01
USER = 0x02
GROUP_OBJ = 0x04
GROUP = 0x08
MASK = 0x10
OTHER = 0x20

UNDEFINED_ID = 0xFFFFFFFF
"""The id of entries that need none."""

_VERSION = 2
_header = struct.Struct("<I")
_entry = struct.Struct("<HHI")

# The order entries must come in (posix_acl_valid): after a tag, the tags that may follow it.
_FOLLOWERS = {
    0: (USER_OBJ,),
    USER_OBJ: (USER, GROUP_OBJ),
    USER: (USER, GROUP_OBJ),
    GROUP_OBJ: (GROUP, MASK, OTHER),
    GROUP: (GROUP, MASK),
    MASK: (OTHER,),
    OTHER: (),
}


class Entry(NamedTuple):
    """One entry: its tag, its permission bits (0 to 7), and for USER and GROUP whom it is about."""

    tag: int
    perm: int
    id: int = UNDEFINED_ID


def parse(data: bytes) -> tuple[Entry, ...]:
    """The entries of an xattr value, in order; none for a value that is only a header, which removes the ACL.

    Raises ValueError for what setxattr(2) would refuse with EINVAL or EOPNOTSUPP.
    """
    if len(data) < _header.size or (len(data) - _header.size) % _entry.size:
        raise ValueError("the length is not that of an ACL")
    if _header.unpack_from(data)[0] != _VERSION:
        raise ValueError("unknown ACL version")
    entries = tuple(Entry(*fields) for fields in _entry.iter_unpack(data[_header.size :]))
    if entries:
        _check(entries)
    return entries


def _check(entries: tuple[Entry, ...]) -> None:
    previous = 0
    named = False
    for entry in entries:
        if entry.tag not in _FOLLOWERS[previous]:
            raise ValueError("ACL entries out of order")
        if entry.perm & ~7:
            raise ValueError("unknown permission in an ACL")
        if entry.tag in (USER, GROUP):
            named = True
            if entry.id == UNDEFINED_ID:
                raise ValueError("an ACL entry for no one")
        if entry.tag == OTHER and named and previous != MASK:
            raise ValueError("an ACL with named entries and no mask")
        previous = entry.tag
    if previous != OTHER:
        raise ValueError("an ACL without an entry for others")


def pack(entries: Iterable[Entry]) -> bytes:
    """The xattr value that holds these entries."""
    return _header.pack(_VERSION) + b"".join(_entry.pack(*entry) for entry in entries)


def equivalent_mode(entries: Iterable[Entry]) -> tuple[int, bool]:
    """The nine permission bits a file with this access ACL shows, and whether they say all that it says.

    The group's bits are the mask, where there is one. Source: posix_acl_equiv_mode.
    """
    mode = 0
    group = 0
    mask = -1
    for entry in entries:
        if entry.tag == USER_OBJ:
            mode |= entry.perm << 6
        elif entry.tag == GROUP_OBJ:
            group = entry.perm
        elif entry.tag == MASK:
            mask = entry.perm
        elif entry.tag == OTHER:
            mode |= entry.perm
    if mask < 0:
        return mode | group << 3, True
    return mode | mask << 3, False


def inherit(default: bytes, mode: int) -> tuple[int, bytes | None]:
    """What a new file gets in a directory with this default ACL: its mode and its access ACL.

    `mode` is as the creator asked for it; the umask has no part in it. The ACL is None where the mode says it all. A
    new directory gets the default ACL as its own, too, unchanged. Raises ValueError as parse. Source: posix_acl_create.
    """
    entries = parse(default)
    if not entries:
        return mode, None
    allowed, equivalent = equivalent_mode(entries)
    inherited = (mode & ~0o777) | (mode & allowed)
    if equivalent:
        return inherited, None
    return inherited, _with_mode(entries, inherited)


def chmod(access: bytes, mode: int) -> bytes:
    """The access ACL after chmod(2) to `mode`. Raises ValueError as parse. Source: posix_acl_chmod."""
    return _with_mode(parse(access), mode)


def _with_mode(entries: tuple[Entry, ...], mode: int) -> bytes:
    """The same ACL with the bits of mode in the entries that the mode stands for."""
    group_tag = MASK if any(entry.tag == MASK for entry in entries) else GROUP_OBJ
    bits = {USER_OBJ: mode >> 6 & 7, group_tag: mode >> 3 & 7, OTHER: mode & 7}
    return pack(Entry(entry.tag, bits.get(entry.tag, entry.perm), entry.id) for entry in entries)


def map_ids(data: bytes, map_uid: Callable[[int], int], map_gid: Callable[[int], int]) -> bytes:
    """The same ACL with the ids of its named entries translated.

    Raises ValueError as parse, and whatever the translation raises.
    """
    return pack(
        Entry(
            entry.tag,
            entry.perm,
            map_uid(entry.id) if entry.tag == USER else map_gid(entry.id) if entry.tag == GROUP else entry.id,
        )
        for entry in parse(data)
    )
