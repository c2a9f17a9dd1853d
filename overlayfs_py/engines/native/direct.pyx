# cython: language_level=3, annotation_typing=False
"""Changes to objects that are the upper layer's alone, made by the system calls that were asked for and no others.

Files made in the place of whiteouts, and whiteouts put in the place of files, are made here, too. As in plain, what can't
be sure to need no more than that is left to core, which does the same in more time.
"""

import os

from libc.errno cimport EEXIST, ENODATA, ENOENT, ENOSYS, ENOTEMPTY, EOPNOTSUPP, EOVERFLOW, errno
from libc.stdint cimport int64_t, uint32_t
from libc.stdio cimport snprintf
from posix.unistd cimport close, ftruncate

from overlayfs_py.core.nodes cimport Node, Real
from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.plain cimport Plain, stat, timespec
from overlayfs_py.engines.native.session cimport Request, Session

from overlayfs_py.core.lookup import lower_positive
from overlayfs_py.core.remove import after_removal
from overlayfs_py.core.rename import moved

cdef extern from "<sched.h>" nogil:
    int CLONE_FS
    int unshare(int flags)

cdef extern from "<fcntl.h>" nogil:
    int AT_EMPTY_PATH, AT_REMOVEDIR, AT_SYMLINK_NOFOLLOW
    int O_CLOEXEC, O_CREAT, O_EXCL, O_NOFOLLOW, O_PATH, O_RDWR
    int openat(int dir_fd, const char* path, int flags, ...)

cdef extern from "<sys/stat.h>" nogil:
    int fchmod(int fd, uint32_t mode)
    int fstat(int fd, stat* st)
    int fstatat(int dir_fd, const char* path, stat* st, int flags)
    int mknodat(int dir_fd, const char* path, uint32_t mode, unsigned long rdev)
    int futimens(int fd, const timespec* times)
    int utimensat(int dir_fd, const char* path, const timespec* times, int flags)
    uint32_t set_umask "umask"(uint32_t mask)
    int64_t UTIME_NOW, UTIME_OMIT

cdef extern from "<sys/xattr.h>" nogil:
    Py_ssize_t getxattr(const char* path, const char* name, void* value, size_t size)
    int lsetxattr(const char* path, const char* name, const void* value, size_t size, int flags)

cdef extern from "<unistd.h>" nogil:
    int fchownat(int dir_fd, const char* path, uint32_t uid, uint32_t gid, int flags)
    int linkat(int old_fd, const char* old, int dir_fd, const char* path, int flags)
    int unlinkat(int dir_fd, const char* path, int flags)
    long syscall(long number, ...)

cdef extern from "<sys/fsuid.h>" nogil:
    int setfsuid(uint32_t uid)
    int setfsgid(uint32_t gid)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_capget, SYS_capset

cdef extern from "<linux/capability.h>" nogil:
    unsigned int _LINUX_CAPABILITY_VERSION_3
    struct cap_header "__user_cap_header_struct":
        unsigned int version
        int pid

cdef extern from "<stdio.h>" nogil:
    int renameat(int old_fd, const char* old, int dir_fd, const char* path)
    int renameat2(int old_fd, const char* old, int dir_fd, const char* path, unsigned int flags)

cdef enum:
    FORMAT = 0o170000
    CHARACTER_DEVICE = 0o020000
    REGULAR = 0o100000
    DIRECTORY = 0o040000
    LINK = 0o120000
    PERMISSIONS = 0o7777
    SET_IDS = 0o6000
    SET_GROUP_ID = 0o2000
    NAME_MAX = 255
    UNPROTECTED = 1  # Node.protection
    NOBODY = 0xFFFFFFFF
    RENAME_NOREPLACE = 1
    # Linux 6.6; the number is the same on every architecture but alpha.
    SYS_FCHMODAT2 = 452

    OWNER = protocol.FATTR_UID | protocol.FATTR_GID
    TIMES = protocol.FATTR_ATIME | protocol.FATTR_MTIME
    NOW = protocol.FATTR_ATIME_NOW | protocol.FATTR_MTIME_NOW
    CHANGES = protocol.FATTR_MODE | OWNER | protocol.FATTR_SIZE | TIMES


def own_umask(Session session):
    """Give this thread a umask of its own (unshare(2), CLONE_FS); where it may not have one, all take turns."""
    if unshare(CLONE_FS) != 0:
        session.direct.side_by_side = False


cdef bint act_as(uint32_t uid, uint32_t gid, cap_sets* sets) noexcept nogil:
    """Have what this thread makes belong to others, as core's acting_as; it may then do what `sets` say."""
    cdef cap_header header
    header.version, header.pid = _LINUX_CAPABILITY_VERSION_3, 0
    setfsgid(gid)
    setfsuid(uid)
    # They tell who it was before, and not whether they have failed.
    return <uint32_t>setfsuid(NOBODY) == uid and <uint32_t>setfsgid(NOBODY) == gid and not syscall(SYS_capset, &header, sets)


cdef class Direct:
    """The changes that need no copy, mark or staging in one overlay. All is called with the session's lock held.

    Making a file lets go of it, as on disk that takes longer than all the rest. Nothing comes between: the kernel asks
    for nothing else in a directory in which something is being made, nor removes it (i_rwsem, directory-locking.rst).
    """

    def __init__(self, fs, Plain plain, lock):
        self.fs = fs
        self.lock = lock
        self.side_by_side = True
        self.dirs = fs.dirs
        self.plain = plain
        config = fs.config
        self.on = fs.work is not None and plain.as_stored
        self.on = self.on and not (config.noacl or config.noxattrs or config.security_label)
        self.uid, self.gid = os.geteuid(), os.getegid()
        cdef cap_header header
        header.version, header.pid = _LINUX_CAPABILITY_VERSION_3, 0
        self.acts = self.on and fs.acts_as_others and syscall(SYS_capget, &header, &self.sets) == 0
        self.work = fs.work
        # What is made in the work directory is to be as it would be in any other.
        self.stages = self.on and fs.work.whiteouts == "device" and not hands_down(fs.work.fd)

    cdef bint _is_own(self, Node node):
        """Whether all there is of an object is one file or directory of the upper layer, under one known name."""
        return (
            node.upper is not None
            and node.upper.parent is not None
            and node.pinned < 0
            and not node.removed
            and not node.indexed
            and not node.metacopy
            and node.aliases is None
            and node.below is None
        )

    cdef Node create(self, Request r, Node parent, bytes name, uint32_t mode, uint32_t umask, stat* st):
        """The node of a regular file made under a free name, attributes in `st`; None leaves it to core. Its descriptor
        is kept, as who makes a file writes to it."""
        cdef int fd, number
        cdef bint own = r.uid == self.uid and r.gid == self.gid
        cdef Node node
        if (
            not self.on
            or mode & FORMAT != REGULAR
            or not (own or self.acts)
            or parent.upper is None
            or parent.pinned >= 0
            or parent.removed
            or len(name) > NAME_MAX
            or name.startswith(b".wh.")
            or (parent.children is not None and name in parent.children)
            or not self.plain.unprotected(parent)
        ):
            return None
        fd = self._make(r, self.dirs.fd(parent.upper), name, mode & PERMISSIONS, umask, st, own)
        if fd == -EEXIST:
            fd = self._make_in_place(self.dirs.fd(parent.upper), name, mode & PERMISSIONS, umask, st) if own else -1
            if fd < 0:
                return None
        if fd < 0:
            raise OSError(-fd, os.strerror(-fd), name)
        node = Node(REGULAR, parent, name, Real(parent.upper.layer, parent.upper, name), ())
        node.upper_ino = st.st_ino
        node.protection = UNPROTECTED
        self.fs.nodes.add(node, self.fs.numbers.number(st.st_dev, st.st_ino))
        if parent.children is None:
            parent.children = {}
        parent.children[name] = node
        self.fs.files.adopt(node, fd, write=True)
        return node

    cdef int _make(self, Request r, int dir_fd, bytes name, uint32_t mode, uint32_t umask, stat* st, bint own):
        """The descriptor of a new file, or minus the error number."""
        cdef int fd
        cdef int number
        cdef const char* path = name
        if self.side_by_side:
            self.dirs.hold()
            self.lock.release()
        with nogil:
            set_umask(umask)
            if own or act_as(r.uid, r.gid, &self.sets):
                fd = openat(dir_fd, path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode)
                number = errno if fd < 0 else 0
            else:
                fd, number = -1, EOVERFLOW
            if not own:
                setfsuid(self.uid)
                setfsgid(self.gid)
            if fd >= 0 and fstat(fd, st) != 0:
                number = errno
                close(fd)
                unlinkat(dir_fd, path, 0)
        if self.side_by_side:
            self.lock.acquire()
            self.dirs.let_go()
        return -number if number else fd

    cdef int _make_in_place(self, int dir_fd, bytes name, uint32_t mode, uint32_t umask, stat* st) except? -1:
        """The descriptor of a new file in the place of a whiteout; -1, and nothing is done, where core has to."""
        cdef int fd, number
        cdef int work_fd
        if (
            not self.stages
            or fstatat(dir_fd, name, st, AT_SYMLINK_NOFOLLOW) != 0
            or not is_whiteout(st)
            or hands_down(dir_fd)
        ):
            return -1
        temporary = self.work.temporary_name()
        work_fd = self.work.fd
        set_umask(umask)
        fd = openat(work_fd, temporary, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode)
        if fd < 0:
            return -1
        # Its filesystem may give it another owner.
        if fstat(fd, st) != 0 or st.st_uid != self.uid or st.st_gid != self.gid:
            close(fd)
            unlinkat(work_fd, temporary, 0)
            return -1
        if renameat(work_fd, temporary, dir_fd, name) != 0 or fstat(fd, st) != 0:
            number = errno
            close(fd)
            unlinkat(work_fd, temporary, 0)
            raise OSError(number, os.strerror(number), name)
        return fd

    cdef bint change(self, Node node, protocol.setattr_in* op, stat* st) except -1:
        """Do what SETATTR asks, attributes then in `st`; False leaves it to core. Set-id bits it takes are core's."""
        cdef timespec times[2]
        cdef Real real
        cdef int at
        cdef int fd = -1
        cdef int flags = AT_SYMLINK_NOFOLLOW
        cdef uint32_t valid = op.valid
        cdef bytes name
        if (
            not self.on
            or not valid & CHANGES
            or (node.kind == LINK and valid & protocol.FATTR_MODE)
            or not self._is_own(node)
            or not self.plain.unprotected(node)
        ):
            return False
        if valid & protocol.FATTR_SIZE:
            fd = self.fs.files.fd(node, write=True)
        else:
            # Who makes a file sets its attributes next: its descriptor spares looking its name up for each.
            held = self.fs.files.entries.get(node)
            if held is not None and held.write:
                fd = held.fd
        if fd >= 0:
            at, name, flags = fd, b"", AT_EMPTY_PATH
        else:
            real = node.upper
            at, name = self.dirs.fd(real.parent), real.name
        if valid & protocol.FATTR_KILL_SUIDGID and (fstatat(at, name, st, flags) != 0 or st.st_mode & SET_IDS):
            return False
        if valid & protocol.FATTR_SIZE and ftruncate(fd, op.size) != 0:
            raise OSError(errno, os.strerror(errno))
        if valid & OWNER and fchownat(
            at,
            name,
            op.uid if valid & protocol.FATTR_UID else <uint32_t>-1,
            op.gid if valid & protocol.FATTR_GID else <uint32_t>-1,
            flags,
        ) != 0:
            raise OSError(errno, os.strerror(errno))
        if valid & protocol.FATTR_MODE and (
            fchmod(fd, op.mode & PERMISSIONS)
            if fd >= 0
            else syscall(SYS_FCHMODAT2, at, <const char*>name, op.mode & PERMISSIONS, flags)
        ) != 0:
            if errno == ENOSYS:
                return False
            raise OSError(errno, os.strerror(errno))
        if valid & TIMES:
            put_time(&times[0], valid & protocol.FATTR_ATIME, valid & protocol.FATTR_ATIME_NOW, op.atime, op.atimensec)
            put_time(&times[1], valid & protocol.FATTR_MTIME, valid & protocol.FATTR_MTIME_NOW, op.mtime, op.mtimensec)
            # Without a name, Linux has that of a descriptor alone since 5.8.
            if (futimens(fd, times) if fd >= 0 else utimensat(at, name, times, flags)) != 0:
                raise OSError(errno, os.strerror(errno))
        if fstatat(at, name, st, flags) != 0:
            raise OSError(errno, os.strerror(errno))
        return self.plain.shown(node, st)

    cdef bint set_xattr(self, Node node, bytes key, const char* value, size_t size, int flags) except -1:
        """setxattr(2); False leaves it to core, as it does keys that are stored as others."""
        cdef char path[320]
        cdef Real real
        if not self.on or not self._is_own(node) or self.fs.marks.to_disk(key) != key:
            return False
        if not self.plain.unprotected(node):
            return False
        real = node.upper
        snprintf(path, sizeof(path), b"/proc/self/fd/%d/%s", <int>self.dirs.fd(real.parent), <const char*>real.name)
        if lsetxattr(path, key, value, size, flags) != 0:
            raise OSError(errno, os.strerror(errno))
        return True

    cdef bint remove(self, Node parent, bytes name, bint directory) except -1:
        """Take away a name, and have a whiteout hide what lower layers have there; False leaves it to core.

        An object of the upper layer lives on, by a descriptor, for as long as the kernel refers to it.
        """
        cdef Node node
        cdef int dir_fd
        cdef int pinned = -1
        cdef int number = 0
        cdef bint whiteout
        if parent.children is None or not self._is_writable(parent):
            return False
        node = parent.children.get(name)
        if node is None or (node.kind == DIRECTORY) != directory or not self.plain.unprotected(node):
            return False
        if node.upper is None:
            return self._hide(node, parent, name)
        if not self._is_here(node, parent, name):
            return False
        whiteout = parent.below is not None and lower_positive(self.fs, parent, name)
        if whiteout and (directory or not self.stages):
            return False
        dir_fd = self.dirs.fd(parent.upper)
        if not self._pin(node, dir_fd, name, &pinned):
            return False
        if whiteout:
            number = self._put_whiteout(dir_fd, name)
        elif unlinkat(dir_fd, name, AT_REMOVEDIR if directory else 0) != 0:
            number = errno
        if number != 0:
            if pinned >= 0:
                close(pinned)
            if number == ENOENT or number == ENOTEMPTY:
                # changed behind our back, or whiteouts are left in it
                return False
            raise OSError(number, os.strerror(number), name)
        after_removal(self.fs, node, parent, name, pinned)
        return True

    cdef bint rename(self, Node old_parent, bytes old_name, Node new_parent, bytes new_name) except -1:
        """Give a file of the upper layer another name; False leaves it to core.

        What it replaces is such a file, too, or one of a lower layer. None may show through where it was.
        """
        cdef Node node, replaced
        cdef int old_fd, new_fd, failed
        cdef int pinned = -1
        if not self._is_writable(old_parent) or not self._is_writable(new_parent) or old_parent.children is None:
            return False
        node = old_parent.children.get(old_name)
        if node is None or node.kind == DIRECTORY or not self._is_here(node, old_parent, old_name):
            return False
        if len(new_name) > NAME_MAX or old_name.startswith(b".wh.") or new_name.startswith(b".wh."):
            return False
        if old_parent is not new_parent and new_parent.upper not in self.fs.impure:
            return False
        if old_parent.below is not None and lower_positive(self.fs, old_parent, old_name):
            return False
        replaced = new_parent.children.get(new_name) if new_parent.children is not None else None
        if replaced is not None and (replaced is node or not self._may_go(replaced, new_parent, new_name)):
            return False
        if not self.plain.unprotected(node) or (replaced is not None and not self.plain.unprotected(replaced)):
            return False
        old_fd, new_fd = self.dirs.fd(old_parent.upper), self.dirs.fd(new_parent.upper)
        if replaced is not None and replaced.upper is not None and not self._pin(replaced, new_fd, new_name, &pinned):
            return False
        if replaced is None:
            # What is there unbeknown, as a whiteout, is core's.
            failed = renameat2(old_fd, old_name, new_fd, new_name, RENAME_NOREPLACE)
        else:
            failed = renameat(old_fd, old_name, new_fd, new_name)
        if failed:
            if pinned >= 0:
                close(pinned)
            return False
        if replaced is not None:
            after_removal(self.fs, replaced, new_parent, new_name, pinned)
        moved(node, old_parent, old_name, new_parent, new_name)
        return True

    cdef bint _is_writable(self, Node parent) except -1:
        """Whether names can be changed in a directory as it is in the upper layer."""
        return (
            self.on
            and parent.upper is not None
            and parent.pinned < 0
            and not parent.removed
            and self.plain.unprotected(parent)
        )

    cdef bint _is_here(self, Node node, Node parent, bytes name):
        """Whether an object is one of the upper layer alone that has this name there."""
        return self._is_own(node) and node.upper.parent is parent.upper and node.upper.name == name

    cdef bint _may_go(self, Node node, Node parent, bytes name) except -1:
        """Whether the only name of a file can go without anything being noted elsewhere."""
        if node.kind == DIRECTORY:
            return False
        return self._is_here(node, parent, name) if node.upper is not None else self._is_single(node)

    cdef bint _is_single(self, Node node) except -1:
        """Whether a file of one lower layer has no other name, which would be counted in the index from now on."""
        cdef Real real
        cdef stat st
        if type(node.below) is not Real or node.removed or node.indexed or node.metacopy or node.aliases is not None:
            return False
        real = <Real>node.below
        return (
            real.parent is not None
            and fstatat(self.dirs.fd(real.parent), real.name, &st, AT_SYMLINK_NOFOLLOW) == 0
            and st.st_nlink == 1
        )

    cdef bint _pin(self, Node node, int dir_fd, bytes name, int* pinned) except -1:
        """Open what is about to lose its name, if the kernel refers to it; False where that can't be."""
        if not node.lookups and not node.opens:
            return True
        if self.fs.pins >= self.fs.most_pins:
            return False
        pinned[0] = openat(dir_fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC)
        return pinned[0] >= 0

    cdef bint _hide(self, Node node, Node parent, bytes name) except -1:
        """Put a whiteout over a file of one lower layer that has no other name; False leaves it to core."""
        if not self.stages or node.kind == DIRECTORY or self.work.whiteout_fd < 0 or not self._is_single(node):
            return False
        if linkat(self.work.whiteout_fd, b"", self.dirs.fd(parent.upper), name, AT_EMPTY_PATH) != 0:
            return False
        after_removal(self.fs, node, parent, name, -1)
        return True

    cdef int _put_whiteout(self, int dir_fd, bytes name):
        """Replace a file by a whiteout; an error number where it is still there, else 0."""
        cdef int number
        cdef int work_fd = self.work.fd
        cdef int whiteout_fd = self.work.whiteout_fd
        temporary = self.work.temporary_name()
        if whiteout_fd < 0 or linkat(whiteout_fd, b"", work_fd, temporary, AT_EMPTY_PATH) != 0:
            # none has been made yet, it has lost all its names, or has as many as can be
            if mknodat(work_fd, temporary, CHARACTER_DEVICE, 0) != 0:
                return errno
            self.work.whiteout_fd = openat(work_fd, temporary, O_PATH | O_NOFOLLOW | O_CLOEXEC)
            if whiteout_fd >= 0:
                close(whiteout_fd)
        if renameat(work_fd, temporary, dir_fd, name) == 0:
            return 0
        number = errno
        unlinkat(work_fd, temporary, 0)
        return number


cdef bint is_whiteout(stat* st) noexcept:
    return st.st_mode & FORMAT == CHARACTER_DEVICE and st.st_rdev == 0


cdef bint hands_down(int dir_fd) except -1:
    """Whether what is made in a directory gets its group or an ACL of it, or that can't be told."""
    cdef char path[32]
    cdef stat st
    if fstat(dir_fd, &st) != 0 or st.st_mode & SET_GROUP_ID:
        return True
    snprintf(path, sizeof(path), b"/proc/self/fd/%d", dir_fd)
    return getxattr(path, b"system.posix_acl_default", NULL, 0) >= 0 or errno not in (ENODATA, EOPNOTSUPP)


cdef void put_time(timespec* at, bint wanted, bint now, int64_t seconds, uint32_t nanoseconds):
    at.tv_sec = seconds
    at.tv_nsec = UTIME_OMIT if not wanted else UTIME_NOW if now else nanoseconds
