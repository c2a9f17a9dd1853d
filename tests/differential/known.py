"""The accepted differences from the kernel's overlayfs, each with its reason; everything else must agree."""

import os
import stat
from dataclasses import dataclass, replace
from typing import Final

from tests.differential.script import (
    Chown,
    Copy,
    HandleChmod,
    HandleLink,
    HandleList,
    HandleSetXattr,
    HandleStat,
    HandleTruncate,
    HandleWrite,
    Link,
    MapWrite,
    Op,
    Open,
    Readdir,
    Remount,
    RemoveXattr,
    Rename,
    Result,
    Rotate,
    SetXattr,
    Step,
    Truncate,
    Where,
    Write,
)
from tests.differential.side import Profile
from tests.support.trees import ACL_ACCESS, ACL_DEFAULT, USER, Difference, Tree


@dataclass(frozen=True, slots=True)
class Known:
    """`what` differs, and `why` that is right."""

    what: str
    why: str


_LONG_REDIRECT: Final = 200

# Scripts leave these operations out, since after them the two sides hold different trees.
LEFT_OUT: Final = (
    Known(
        "renameat2 with RENAME_WHITEOUT works",
        "the kernel's overlayfs refuses it with EINVAL; container engines that nest overlays need it",
    ),
    Known(
        "in the portable engine, set-group-id without group execution stays when an outsider changes the file",
        "FUSE in the kernel takes these bits itself there, and leaves that one",
    ),
    Known(
        "in the portable engine, O_TMPFILE, fallocate, ioctl, SEEK_DATA and SEEK_HOLE are refused or emulated",
        "pyfuse3 has no handler for them",
    ),
    Known(
        "names that begin with .wh. are marks of deletion in lower layers",
        "container engines unpack layers with such names where a mount program is set",
    ),
    Known(
        "a directory all of whose entries are gone or hidden by xattr whiteouts can be removed",
        "the kernel's overlayfs says ENOTEMPTY",
    ),
    Known(
        "a file that is immutable or may only grow can be opened for writing, and writing says EPERM",
        "opening asks the daemon nothing; the kernel's overlayfs says it then",
    ),
)

# Steps that are skipped, as far as `undefined` sees them coming.
SKIPPED: Final = (
    Known(
        "a lower file that is unlinked while open can be changed through its handle",
        "the kernel's overlayfs copies it up to its old name then: it fails with EEXIST, or the name comes back",
    ),
    Known(
        "hard links of symlinks, devices, FIFOs and sockets with `userxattr`",
        "they cannot carry user xattrs: their names part on copy-up; the kernel's index loses them and its next mount "
        "fails with ENODATA",
    ),
    Known(
        "a change through a shared mapping takes the capabilities of a file, as write(2) does",
        "it reaches the daemon as a write, and the upper filesystem takes them then",
    ),
    Known(
        "in a user namespace, hard links are kept",
        "the kernel's overlayfs has no index there, and gives the names of a copied-up file different inode numbers",
    ),
    Known(
        "in a user namespace, set-id bits go with changes through a shared mapping, and stay with O_TRUNC by its root",
        "the upper filesystem takes them when the daemon writes there; O_TRUNC copies nothing, so there is no write",
    ),
    Known(
        "set-group-id without group execution stays when someone outside the group writes or changes the owner",
        "the FUSE part of the kernel takes only set-group-id with group execution",
    ),
    Known(
        "removing an access ACL leaves set-group-id",
        "it does on the kernel's other filesystems; its overlayfs takes it from those outside the group",
    ),
    Known(
        "chown(-1, -1) leaves the set-id bits of a file with capabilities, and is nothing, not EPERM, to who may not",
        "the FUSE part of the kernel asks for the same as before a write",
    ),
    Known(
        "with `metacopy=on`, a file opened for writing, not written, and then changed, has no data in the upper",
        "opening asks the daemon nothing; the kernel's overlayfs copies the data up then",
    ),
    Known(
        "links and renames of metacopies with a path longer than 256 bytes",
        "the kernel's overlayfs has no redirect so long and says EXDEV, also for empty files",
    ),
)

# Fields of trees that may differ one way, as `better` tells.
BETTER: Final = (
    Known(
        "copied-up files keep more of their holes",
        "the kernel's overlayfs copies a hole that begins in the same mebibyte as data",
    ),
    Known(
        "`impure` on a directory that holds no copies, of either side",
        "the mark allows for copies; that it is wherever one is, is checked",
    ),
)

# Marks that an upper of the kernel's may have in addition, as `better` tells.
NEEDLESS_MARKS: Final = (
    Known(
        "a redirect or opaque mark on a directory that could not be moved, or a redirect on an empty file",
        "the kernel's overlayfs writes it before it knows whether it will be needed; it says what is so anyway",
    ),
)

# Never compared, see Profile.atimes.
UNCOMPARED: Final = (
    Known(
        "in a user namespace, reading sets access times in the layers",
        "it takes privilege to mount them again without; the kernel's overlayfs opens each file with O_NOATIME",
    ),
)

# Parts of the upper directory that may be there on one side alone, as `without_needless_copies` tells.
NEEDLESS_COPIES: Final = (
    Known(
        "which names of a hard-linked lower file are in the upper layer",
        "a FUSE filesystem is told the file, not the name it was opened by; the index makes it the same to see. An "
        "upper used as a lower layer loses its index, so scripts make none of one that needs it",
    ),
    Known(
        "a file that is in the upper layer, unchanged, because an operation on it failed",
        "the kernel's overlayfs copies up before it asks the upper filesystem; where we know the answer, we don't",
    ),
)

# The kernel's side is asked in a way that avoids these.
AVOIDED: Final = (
    Known(
        "a file opened read-only before its copy-up shows what is written after it",
        "POSIX; the kernel's overlayfs goes on showing the lower file in mappings made before, though not in reads",
    ),
)

# Marks of the upper root that only the kernel writes; it does so whenever it mounts an upper without them.
ROOT_MARKS: Final = {
    "uuid": "a random uuid gives the kernel's statfs a persistent f_fsid",
    "origin": "names the topmost lower root, with which alone the kernel's index may be used from then on",
}

# Results that may differ, as `accepted` tells.
ACCEPTED: Final = (
    Known(
        "fstat of an unlinked lower file says nlink 0",
        "POSIX; the kernel's overlayfs gives the link count of the lower file, which stays",
    ),
    Known(
        "in a user namespace, removing or replacing a security xattr that is not there gives ENODATA",
        "the kernel's overlayfs asks the upper filesystem, which says EPERM",
    ),
    Known(
        "inode numbers stay the same across copy-up and remount in a user namespace, too, but for hard links",
        "the kernel's overlayfs needs a privilege there to decode the handles that tell them",
    ),
    Known(
        "with `userxattr`, when the inode numbers of symlinks, devices, FIFOs and sockets change",
        "they cannot hold the origin that keeps them; so it is at the first remount after the copy-up, needless or not",
    ),
    Known(
        "a directory too deep to be moved by a redirect (256 bytes), onto one that is not empty, gives ENOTEMPTY",
        "the kernel's overlayfs says EXDEV first, if the target is of the upper layer alone",
    ),
    Known(
        "a whiteout where nothing is below is not listed",
        "the kernel's overlayfs lists a directory of one layer as it is, whiteouts too; they lead nowhere",
    ),
    Known(
        "opening a metacopy for writing leaves its mtime and capabilities, until something is written",
        "POSIX; the kernel's overlayfs changes them when it copies the data up",
    ),
    Known(
        "removing an ACL that a file does not have succeeds",
        "it does on the kernel's other filesystems; its overlayfs says ENODATA, but only until the file is copied up",
    ),
)


def undefined(side: Where, step: Step, profile: Profile) -> bool:
    """Whether a step would do on the kernel's side what SKIPPED lists."""
    match step.op:
        case MapWrite(path=path):
            return _has_capability(side.at(path)) or (profile.user_namespace and _has_set_ids(side.at(path)))
        case Open(flags=flags) if profile.metacopy and flags & os.O_ACCMODE:
            return not flags & os.O_TRUNC
        case Open(path=path, flags=flags) if profile.user_namespace and flags & os.O_TRUNC:
            return _has_set_ids(side.at(path))
        case Write(path=path, flags=flags) if profile.user_namespace and flags & os.O_TRUNC:
            return _has_set_ids(side.at(path))
        case Chown(path=path, uid=-1, gid=-1) if _has_set_ids(side.at(path)) and (
            step.who or _has_capability(side.at(path))
        ):
            return True
        case Write(path=path) | Truncate(path=path) | Chown(path=path) | Copy(new=path) | Open(path=path) if step.who:
            return _is_set_gid_only(_mode(side.at(path)))
        case HandleWrite(slot=slot) | HandleTruncate(slot=slot) if step.who and slot in side.handles:
            return _is_set_gid_only(os.fstat(side.handles[slot].descriptor).st_mode)
        case RemoveXattr(path=path, name="system.posix_acl_access") if step.who:
            return bool(_mode(side.at(path)) & stat.S_ISGID)
        case Copy(old=old, new=new) if profile.metacopy:
            return old == new
        case Rotate():
            return side.would_lose_links()
        case HandleChmod(slot=slot) | HandleSetXattr(slot=slot):
            return _is_deleted(side, slot)
        case Link(old=path) | Rename(old=path) | Rename(new=path, flags=2) if (
            profile.metacopy and len(path) > _LONG_REDIRECT
        ):
            return True
        case Link() | HandleLink() if profile.user_namespace:
            return True
        case Link(old=old) if profile.prefix == USER:
            return os.path.lexists(side.at(old)) and not _can_hold_origin(side.at(old))
    return False


def _mode(path: bytes, *, follow: bool = True) -> int:
    """The mode of what is at a path; 0 where that can't be told."""
    try:
        return os.stat(path, follow_symlinks=follow).st_mode
    except OSError:
        return 0


def _has_set_ids(path: bytes) -> bool:
    return bool(_mode(path) & (stat.S_ISUID | stat.S_ISGID))


def _has_capability(path: bytes) -> bool:
    try:
        return "security.capability" in os.listxattr(path)
    except OSError:
        return False


def _is_set_gid_only(mode: int) -> bool:
    return mode & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID


def accepted(side: Where, step: Step, first: Result, second: Result, profile: Profile) -> bool:
    """Whether results differ as ACCEPTED lists."""
    match step.op, first.error, second.error:
        case RemoveXattr(name=name), "ENODATA", "":
            return name in (ACL_ACCESS, ACL_DEFAULT)
        case ((RemoveXattr() | SetXattr(flags=os.XATTR_REPLACE)), "EPERM", "ENODATA"):
            return True
        case Rename(), "EXDEV", "ENOTEMPTY":
            return True
        case op, "", "":
            return _accepted_values(side, op, first.value, second.value, profile)
    return False


def _accepted_values(side: Where, op: Op, first: object, second: object, profile: Profile) -> bool:
    match op, first, second:
        case Remount(), [*first_names], [*second_names]:
            only_second = [
                side.at(path) for path in second_names if path not in first_names and isinstance(path, bytes)
            ]
            return profile.prefix == USER and not any(map(_can_hold_origin, only_second))
        case ((Readdir() | HandleList()), [*first_names], [*second_names]):
            ghosts = [entry for entry in first_names if entry not in second_names]
            kept = [entry for entry in first_names if entry in second_names]
            return kept == second_names and all(_is_ghost(side, op, entry) for entry in ghosts)
        case HandleStat(slot=slot), {"nlink": 1}, {"nlink": 0}:
            return _is_deleted(side, slot) and _same_but(first, second, "nlink")
        case _, {"mtime": "now"}, {"mtime": int()} if profile.metacopy:
            return _same_but(first, second, "mtime", "xattrs") and _loses_capability(first, second)
    return False


def _can_hold_origin(path: bytes) -> bool:
    """Whether user xattrs can be set on what is at a path."""
    mode = _mode(path, follow=False)
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _same_but(first: object, second: object, *keys: str) -> bool:
    assert isinstance(first, dict) and isinstance(second, dict)
    return all(first[key] == second.get(key) for key in first if key not in keys)


def _loses_capability(first: object, second: object) -> bool:
    """Whether the xattrs are the same, but for a capability that the first may no longer have."""
    assert isinstance(first, dict) and isinstance(second, dict)
    now, before = first.get("xattrs", ()), second.get("xattrs", ())
    return now in (before, tuple(item for item in before if item[0] != "security.capability"))


def _is_ghost(side: Where, op: Op, entry: object) -> bool:
    """Whether an entry of a listing leads nowhere."""
    match op:
        case Readdir(path=path) if isinstance(entry, tuple):
            at = os.path.join(side.at(path), entry[0])
        case HandleList(slot=slot) if isinstance(entry, bytes):
            at = b"/proc/self/fd/%d/%s" % (side.handles[slot].descriptor, entry)
        case _:
            return False
    return not os.path.lexists(at)


def without_ghosts(tree: Tree) -> Tree:
    """A tree the kernel's overlayfs shows, without names it lists but can't find."""
    return {path: entry for path, entry in tree.items() if entry.kind != "error: ENOENT"}


def better(found: Difference, prefix: str, *, metacopy: bool, failures: bool) -> bool:
    """Whether a difference between the kernel's tree and ours is one that BETTER, NEEDLESS_MARKS or ACCEPTED lists.

    `failures` says whether any operation has failed.
    """
    if found.field == "mtime" and metacopy:
        return found.left == "now"
    if found.field == "sparse":
        return not found.left
    if found.field == "xattrs" and isinstance(found.left, tuple) and isinstance(found.right, tuple):
        extra = {name for name, _ in {*found.left} ^ {*found.right}}
        needless: set[str] = set()
        if failures and not {*found.right} - {*found.left}:
            needless |= {f"{prefix}redirect", f"{prefix}opaque"}
        if metacopy and not {*found.left} - {*found.right}:
            needless.add("security.capability")
        return extra <= {f"{prefix}impure"} | needless
    return False


def without_needless_copies(tree: Tree, other: Tree, prefix: str, *, failures: bool) -> Tree:
    """An upper directory without what NEEDLESS_COPIES allows it to hold in addition to `other`.

    `failures` says whether any operation has failed.
    """
    needless: set[bytes] = set()
    for path in sorted(tree.keys() - other.keys(), key=lambda path: -path.count(b"/")):
        marks = {name.removeprefix(prefix) for name, _ in tree[path].xattrs}
        if tree[path].kind == "dir":
            below = {inner for inner in tree if inner.startswith(path + b"/")}
            copied = "origin" in marks and below <= needless
        else:
            unmarked = prefix == USER and tree[path].kind != "file"
            copied = ("origin" in marks and "nlink" in marks) or (failures and ("origin" in marks or unmarked))
        if copied:
            needless.add(path)
    return {path: entry for path, entry in tree.items() if path not in needless}


def with_needless_data(tree: Tree, other: Tree, prefix: str) -> Tree:
    """An upper directory with its metacopies as whole as in `other`, where an operation that failed copied data up.

    That it is the same data is seen in the mounts.
    """
    mark = (f"{prefix}metacopy", b"")
    whole = dict(tree)
    for path, entry in tree.items():
        if mark in entry.xattrs and path in other and mark not in other[path].xattrs:
            xattrs = tuple(item for item in entry.xattrs if item != mark)
            whole[path] = replace(entry, content=other[path].content, xattrs=xattrs)
    return whole


def _is_deleted(side: Where, slot: int) -> bool:
    if slot not in side.handles:
        return False
    return os.readlink(b"/proc/self/fd/%d" % side.handles[slot].descriptor).endswith(b" (deleted)")
