"""The accepted differences from the kernel's overlayfs, each with its reason; everything else must agree."""

import os
import stat
from dataclasses import dataclass
from typing import Final

from tests.differential.script import HandleChmod, HandleSetXattr, HandleStat, Link, Step, Where


@dataclass(frozen=True, slots=True)
class Known:
    """`what` differs, and `why` that is right."""

    what: str
    why: str


# Scripts leave these operations out, since after them the two sides hold different trees.
LEFT_OUT: Final = (
    Known(
        "renameat2 with RENAME_WHITEOUT works",
        "the kernel's overlayfs refuses it with EINVAL; container engines that nest overlays need it",
    ),
    Known(
        "O_TMPFILE, fallocate, ioctl, lseek with SEEK_DATA and SEEK_HOLE are refused or emulated",
        "pyfuse3 has no handler for them",
    ),
    Known(
        "names that begin with .wh. are marks of deletion in lower layers",
        "container engines unpack layers with such names where a mount program is set",
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
        "they cannot carry user xattrs, so the kernel's index loses them and its next mount fails: ENODATA",
    ),
)

# The kernel's side is asked in a way that avoids these.
AVOIDED: Final = (
    Known(
        "a file opened read-only before its copy-up shows what is written after it",
        "POSIX; the kernel's overlayfs goes on showing the lower file until it is opened again",
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
)


def undefined(side: Where, step: Step, *, userxattr: bool) -> bool:
    """Whether a step would do on the kernel's side what SKIPPED lists."""
    match step.op:
        case HandleChmod(slot=slot) | HandleSetXattr(slot=slot):
            return _is_deleted(side, slot)
        case Link(old=old) if userxattr:
            try:
                return not stat.S_ISREG(os.lstat(side.at(old)).st_mode)
            except OSError:
                return False
    return False


def accepted(side: Where, step: Step, first: object, second: object) -> bool:
    """Whether results differ as ACCEPTED lists."""
    if isinstance(step.op, HandleStat) and isinstance(first, dict) and isinstance(second, dict):
        return {**first, "nlink": 0} == second and first["nlink"] == 1 and _is_deleted(side, step.op.slot)
    return False


def _is_deleted(side: Where, slot: int) -> bool:
    if slot not in side.handles:
        return False
    return os.readlink(b"/proc/self/fd/%d" % side.handles[slot].descriptor).endswith(b" (deleted)")
