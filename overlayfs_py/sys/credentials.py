"""What this process may do, and for whom a thread makes files."""

import ctypes
import errno
import os

from overlayfs_py.sys.libc import LIBC, last_error

CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_SETGID = 6
CAP_SETUID = 7
CAP_MKNOD = 27
CAP_SYS_ADMIN = 21

_VERSION_3 = 0x20080522  # _LINUX_CAPABILITY_VERSION_3, capget(2)


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


# struct __user_cap_data_struct, two times: effective, permitted, inheritable.
_Sets = ctypes.c_uint32 * 6

for _function in (LIBC.capget, LIBC.capset):
    _function.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    _function.restype = ctypes.c_int
for _function in (LIBC.setfsuid, LIBC.setfsgid):
    _function.argtypes = (ctypes.c_uint32,)
    _function.restype = ctypes.c_int

_NOBODY = 0xFFFFFFFF


def has_capability(cap: int) -> bool:
    """Whether `cap` (linux/capability.h) is effective, in the user namespace of this process. Source: proc(5)."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"CapEff:"):
                return bool(int(line[7:], 16) >> cap & 1)
    return False


def in_initial_user_namespace() -> bool:
    """Whether user ids are those of the machine: the map covers all of them one to one. Source: user_namespaces(7)."""
    with open("/proc/self/uid_map", "rb") as id_map:
        return id_map.read().split() == [b"0", b"0", b"4294967295"]


def may_act_as_others() -> bool:
    """Whether acting_as works in this process for others than its own user."""
    return os.geteuid() == 0 and has_capability(CAP_SETUID) and has_capability(CAP_SETGID)


class acting_as:
    """What this thread makes while the block runs belongs to another user and group; what it may do stays the same.

    The process is not dumpable from then on: it dumps no core, and its files in /proc are those of the first root.
    EOVERFLOW for ids that don't exist in this process's user namespace. Source: setfsuid(2), capabilities(7).
    """

    __slots__ = ("gid", "own", "uid")

    def __init__(self, uid: int, gid: int) -> None:
        self.uid = uid
        self.gid = gid
        self.own = (os.geteuid(), os.getegid())

    def __enter__(self) -> None:
        if (self.uid, self.gid) == self.own:
            return
        header, sets = _Header(_VERSION_3, 0), _Sets()
        if LIBC.capget(ctypes.byref(header), sets) != 0:
            raise last_error()
        LIBC.setfsgid(self.gid)
        LIBC.setfsuid(self.uid)
        # They tell of no failure, only who it was before. Who isn't root any more has lost capabilities.
        acts = LIBC.setfsuid(_NOBODY) & _NOBODY == self.uid and LIBC.setfsgid(_NOBODY) & _NOBODY == self.gid
        if not acts or LIBC.capset(ctypes.byref(header), sets) != 0:
            error = last_error() if acts else OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
            self.__exit__()
            raise error

    def __exit__(self, *_: object) -> None:
        if (self.uid, self.gid) != self.own:
            LIBC.setfsuid(self.own[0])
            LIBC.setfsgid(self.own[1])
