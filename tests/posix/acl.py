"""POSIX access control lists as the kernel keeps them in xattrs, linux/posix_acl_xattr.h."""

import os
import struct
from typing import Final, NamedTuple

ACCESS: Final = "system.posix_acl_access"
DEFAULT: Final = "system.posix_acl_default"

_VERSION: Final = 2
_TAGS: Final = {"user::": 0x01, "user": 0x02, "group::": 0x04, "group": 0x08, "mask": 0x10, "other": 0x20}
_NO_ID: Final = 0xFFFFFFFF


class Entry(NamedTuple):
    """One entry: a tag, an id for "user" and "group", and permission bits."""

    tag: str
    who: int
    bits: int


def parse(text: str) -> list[Entry]:
    """Entries from `user::rwx,user:1:r--,group::r-x,mask::r-x,other::---`, as setfacl(1) writes them."""
    entries = []
    for part in text.split(","):
        tag, who, letters = part.split(":")
        if not who and tag in ("user", "group"):
            tag += "::"
        bits = sum(bit for letter, bit in (("r", 4), ("w", 2), ("x", 1)) if letter in letters)
        entries.append(Entry(tag, int(who or _NO_ID), bits))
    return entries


def show(entries: list[Entry]) -> str:
    """The inverse of `parse`."""
    parts = []
    for tag, who, bits in entries:
        letters = "".join(letter if bits & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))
        name = tag.rstrip(":")
        parts.append(f"{name}:{'' if who == _NO_ID else who}:{letters}")
    return ",".join(parts)


def encode(text: str) -> bytes:
    """The xattr for these entries."""
    return struct.pack("<I", _VERSION) + b"".join(
        struct.pack("<HHI", _TAGS[tag], bits, who) for tag, who, bits in parse(text)
    )


def decode(value: bytes) -> str:
    """The entries of an xattr."""
    assert struct.unpack_from("<I", value)[0] == _VERSION
    tags = {number: tag for tag, number in _TAGS.items()}
    return show([Entry(tags[tag], who, bits) for tag, bits, who in struct.iter_unpack("<HHI", value[4:])])


def set_acl(path: str, text: str, kind: str = ACCESS) -> None:
    """Give a file an access list, or a directory a default one."""
    os.setxattr(path, kind, encode(text))


def get_acl(path: str, kind: str = ACCESS) -> str:
    """The list of a file; OSError with ENODATA if it has none."""
    return decode(os.getxattr(path, kind))
