"""Owners: between the disk and what the mount shows, and in the xattrs that stand for a file's real owner and mode."""

from __future__ import annotations

import errno
import os
import stat

from overlayfs_py.config import IdRange
from overlayfs_py.records import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import re
    from collections.abc import Container

OVERFLOW_ID = 65534
"""Shown as the owner where the map has no id for the real one (proc(5), overflowuid)."""

# Range of ids as (first, end, what to add).
_Ranges = tuple[tuple[int, int, int], ...]


class IdMap:
    """Translates owners between the disk and the mount; ids that no range covers have no counterpart.

    `identity` is true if no id is changed, so that callers can skip the translation. `squashes` is true if every owner
    is shown as one id: a change of owner is then stored as far as the process may, and its failure (EPERM, or EINVAL
    for an id outside the user namespace) is no error for the caller, who could not see its success either.
    """

    __slots__ = (
        "_gid_disk",
        "_gid_shown",
        "_squash_gid",
        "_squash_uid",
        "_uid_disk",
        "_uid_shown",
        "identity",
        "squashes",
    )

    def __init__(
        self,
        uids: tuple[IdRange, ...] = (),
        gids: tuple[IdRange, ...] = (),
        *,
        squash_uid: int | None = None,
        squash_gid: int | None = None,
    ) -> None:
        self._uid_shown = _shown_ranges(uids)
        self._gid_shown = _shown_ranges(gids)
        self._uid_disk = _disk_ranges(uids)
        self._gid_disk = _disk_ranges(gids)
        self._squash_uid = squash_uid
        self._squash_gid = squash_gid
        self.squashes = squash_uid is not None or squash_gid is not None
        self.identity = not (uids or gids or self.squashes)

    def uid_to_shown(self, uid: int) -> int:
        """The user shown as owner for the one on disk; OVERFLOW_ID if none is."""
        if self._squash_uid is not None:
            return self._squash_uid
        return _translate(uid, self._uid_shown)

    def gid_to_shown(self, gid: int) -> int:
        """As uid_to_shown, for groups."""
        if self._squash_gid is not None:
            return self._squash_gid
        return _translate(gid, self._gid_shown)

    def uid_to_disk(self, uid: int) -> int:
        """The user to store for one that chown(2) or an ACL names; EOVERFLOW if the map has none, as in the kernel's
        idmapped mounts. Squashing changes what is shown, not what is stored."""
        return _translate_strictly(uid, self._uid_disk)

    def gid_to_disk(self, gid: int) -> int:
        """As uid_to_disk, for groups."""
        return _translate_strictly(gid, self._gid_disk)

    def creator_to_disk(self, uid: int, gid: int) -> tuple[int, int]:
        """The owner to store for what this user and group create; OVERFLOW_ID where the map has none.

        Container engines put files into a container's root as a user that is not in the map, then change the owner.
        """
        return _translate(uid, self._uid_disk), _translate(gid, self._gid_disk)


def _shown_ranges(ranges: tuple[IdRange, ...]) -> _Ranges:
    return tuple((r.disk, r.disk + r.count, r.shown - r.disk) for r in ranges)


def _disk_ranges(ranges: tuple[IdRange, ...]) -> _Ranges:
    return tuple((r.shown, r.shown + r.count, r.disk - r.shown) for r in ranges)


def _translate(number: int, ranges: _Ranges) -> int:
    if not ranges:
        return number
    for first, end, difference in ranges:
        if first <= number < end:
            return number + difference
    return OVERFLOW_ID


def _translate_strictly(number: int, ranges: _Ranges) -> int:
    if not ranges:
        return number
    for first, end, difference in ranges:
        if first <= number < end:
            return number + difference
    raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))


PRIVILEGED_OVERRIDE_KEY = b"security.fuseoverlayfs.override_stat"
CONTAINERS_OVERRIDE_KEY = b"user.containers.override_stat"
USER_OVERRIDE_KEY = b"user.fuseoverlayfs.override_stat"

OVERRIDE_KEYS = (PRIVILEGED_OVERRIDE_KEY, CONTAINERS_OVERRIDE_KEY, USER_OVERRIDE_KEY)
"""All keys that are read, the one that counts first."""

_WRITTEN_KEYS = {1: PRIVILEGED_OVERRIDE_KEY, 2: CONTAINERS_OVERRIDE_KEY}

_KINDS = {
    b"file": stat.S_IFREG,
    b"dir": stat.S_IFDIR,
    b"symlink": stat.S_IFLNK,
    b"pipe": stat.S_IFIFO,
    b"socket": stat.S_IFSOCK,
    b"block": stat.S_IFBLK,
    b"char": stat.S_IFCHR,
}
_KIND_NAMES = {kind: name for name, kind in _KINDS.items()}

# As containers/storage reads it: fields after the fourth, and parts of a device after the minor number, are for later
# versions.
_OVERRIDE = (
    rb"(?P<uid>[0-9]{1,10}):(?P<gid>[0-9]{1,10}):(?P<mode>[0-7]{1,11})"
    rb"(?::(?:(?P<kind>file|dir|symlink|pipe|socket)"
    rb"|(?P<device>block|char)-(?P<major>[0-9]{1,4})-(?P<minor>[0-9]{1,7})(?:-[^:]*)?)(?::.*)?)?"
)
_override_format: re.Pattern[bytes] | None = None
_MAJOR_LIMIT = 1 << 12
_MINOR_LIMIT = 1 << 20
_ID_LIMIT = 0xFFFFFFFF


class Override(NamedTuple):
    """What a file is to be shown as, whatever the disk says.

    uid and gid as on disk, so an IdMap still applies; mode: the twelve permission bits; kind: the type as in st_mode
    (S_IFREG and so on), or None if the real type holds; rdev: the device number, 0 unless kind is a device.
    """

    uid: int
    gid: int
    mode: int
    kind: int | None = None
    rdev: int = 0


def override_key(xattr_permissions: int) -> bytes:
    """The key that is written with this value of the option: 1 the privileged one, 2 that of containers/storage.

    Only the privileged one can be set on symbolic links and special files (xattr(7)).
    """
    _load_format()
    return _WRITTEN_KEYS[xattr_permissions]


def layer_override_key(root_keys: Container[bytes]) -> bytes | None:
    """The key that counts in a layer, which the xattrs of its root tell; None if owners there are the real ones."""
    for key in OVERRIDE_KEYS:
        if key in root_keys:
            _load_format()
            return key
    return None


def _load_format() -> re.Pattern[bytes]:
    """What only a mount with such a layer needs, and has before it serves, as a mount may lie over the library."""
    global _override_format
    if _override_format is None:
        import re

        _override_format = re.compile(_OVERRIDE, re.DOTALL)
    return _override_format


def parse_override(value: bytes) -> Override:
    """Read `uid:gid:mode[:type]`, mode octal, type file, dir, symlink, pipe, socket, block-M-m or char-M-m.

    Raises ValueError for anything else. Source: containers/storage, pkg/idtools, ContainersOverrideXattr.
    """
    match = _load_format().fullmatch(value)
    if match is None:
        raise ValueError("not an override_stat value")
    uid = int(match["uid"])
    gid = int(match["gid"])
    if uid >= _ID_LIMIT or gid >= _ID_LIMIT:
        raise ValueError("an owner that no file can have")
    mode = int(match["mode"], 8) & 0o7777
    if match["device"] is not None:
        major = int(match["major"])
        minor = int(match["minor"])
        if major >= _MAJOR_LIMIT or minor >= _MINOR_LIMIT:
            raise ValueError("a device number that no file can have")
        return Override(uid, gid, mode, _KINDS[match["device"]], os.makedev(major, minor))
    return Override(uid, gid, mode, None if match["kind"] is None else _KINDS[match["kind"]])


def format_override(override: Override) -> bytes:
    """The value that parse_override reads as `override`, as containers/storage writes it."""
    value = b"%d:%d:%04o" % (override.uid, override.gid, override.mode)
    if override.kind is None:
        return value
    value += b":" + _KIND_NAMES[override.kind]
    if stat.S_ISBLK(override.kind) or stat.S_ISCHR(override.kind):
        value += b"-%d-%d" % (os.major(override.rdev), os.minor(override.rdev))
    return value


def apply_override(override: Override, mode: int, rdev: int) -> tuple[int, int]:
    """The st_mode and st_rdev to show for a file that has these on disk.

    The type changes only from a regular file to a device, FIFO or socket, as container engines write them where they
    can't make the real one; any other would promise contents that are not there.
    """
    kind = override.kind
    if kind is not None and stat.S_ISREG(mode) and kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
        return kind | override.mode, override.rdev
    return stat.S_IFMT(mode) | override.mode, rdev
