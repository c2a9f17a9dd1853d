# cython: language_level=3, annotation_typing=False
"""The objects that nothing has to be decided of, looked up in a few system calls: most objects of most layers.

An object is plain where no mark, mapping or hard link has a part in what the mount shows of it. Everything here answers
so, or leaves the question to core, which gives the same answer in more time.
"""

from libc.errno cimport ENODATA, ENOENT, ENOSYS, EOPNOTSUPP, errno
from libc.string cimport memcpy, strncmp
from posix.unistd cimport close

from overlayfs_py.core.nodes cimport Node, Real
from overlayfs_py.engines.native.xattrs cimport get_xattr, list_xattrs

from overlayfs_py.core.ids import PRIVILEGED_OVERRIDE_KEY
from overlayfs_py.core.marks import FOREIGN_OPAQUE
from overlayfs_py.core.merged import EVERYWHERE, positions
from overlayfs_py.core.protection import of as protection_of
from overlayfs_py.core.readdir import merge_layer

cdef extern from "<sys/stat.h>" nogil:
    int fstat(int fd, stat* st)
    bint S_ISDIR(uint32_t mode)
    bint S_ISREG(uint32_t mode)

    struct statx_timestamp:
        int64_t tv_sec
        uint32_t tv_nsec
    struct statx_buf "statx":
        uint32_t stx_mask
        uint64_t stx_attributes
        statx_timestamp stx_btime
    int read_statx "statx"(int dir_fd, const char* path, int flags, unsigned int mask, statx_buf* st)
    unsigned int STATX_BTIME, STATX_TYPE

cdef extern from "<fcntl.h>" nogil:
    int AT_EMPTY_PATH, O_NOCTTY, O_NONBLOCK

cdef enum:
    FORMAT = 0o170000
    REGULAR = 0o100000
    DIRECTORY = 0o040000
    LONGEST = 255 - 4  # bytes of a name that has room for `.wh.` before it
    MISSED_DIRS = 256
    # As of core's merged directories.
    BYTES_A_MISS = 1024

    # Node.protection without a flag, and the flags.
    KNOWN = 1
    PROTECTED = 0x30

    GONE = 0
    FOUND = 1
    HIDDEN = 2
    UNDECIDED = -1


ABSENT = object()
"""What `entry` answers where no layer has the name."""


cdef class Plain:
    """The plain objects of one overlay. All is called with the session's lock held."""

    def __init__(self, fs):
        self.fs = fs
        self.dirs = fs.dirs
        self.nodes = fs.nodes
        self.numbers = fs.numbers
        self.merged = fs.merged
        self.follow_redirects = fs.follow_redirects
        self.upper_misses = {}
        self.prefix = fs.marks.prefix
        self.foreign_opaque = FOREIGN_OPAQUE
        self.opaque = fs.marks.opaque
        self.protattr = fs.marks.protattr
        self.as_stored = fs.ids.identity and all(layer.override is None for layer in fs.layers)
        self.for_ever = fs.config.timeout == float("inf")
        self.static_nlink = fs.config.static_nlink
        # Below it nothing is merged, whatever its marks say.
        self.lowest = fs.lower_roots[-1].layer if fs.lower_roots else None

    cdef object entry(self, Node parent, bytes name, stat* st):
        """The node of `name` in a directory, with its attributes in `st`; ABSENT; or None, which leaves it to core."""
        cdef stat below
        cdef int dir_fd
        cdef int answer
        if not self.as_stored:
            return None
        if parent.children is not None:
            known = parent.children.get(name)
            if known is not None:
                return known if self.attributes(<Node>known, st) else None
        if parent.removed or len(name) > LONGEST or name.startswith(b".wh."):
            return None
        upper = None
        if parent.upper is not None:
            answer = self._ask(parent.upper, name, parent.markless, &dir_fd, st)
            if answer == GONE and not parent.markless and self._markless(parent):
                parent.markless = True
            if answer == UNDECIDED:
                return None
            if answer == HIDDEN:
                return ABSENT
            if answer == FOUND:
                if self._may_be_marked(dir_fd, name):
                    return None
                upper = Real(parent.upper.layer, parent.upper, name)
                if not S_ISDIR(st.st_mode) or parent.below is None:
                    return self._new(parent, name, st, st, upper, ())
                if self._ends(name, dir_fd, parent.markless):
                    return None
        lowers = self._lowers(parent, name, &below)
        if lowers is None:
            return None
        if upper is None:
            if not lowers:
                if parent.below is not None:
                    self.merged.missed(parent)
                return ABSENT
            st[0] = below
        elif not lowers or not S_ISDIR(below.st_mode):
            return self._new(parent, name, st, st, upper, ())
        return self._new(parent, name, st, &below, upper, lowers)

    cdef tuple _lowers(self, Node parent, bytes name, stat* st):
        """What lower directories have under a name, with the attributes of the topmost; None leaves it to core."""
        cdef stat one
        cdef Real base
        cdef Real real
        cdef int dir_fd
        cdef int answer
        cdef bint unmarked
        cdef Py_ssize_t position
        cdef Py_ssize_t count = lower_count(parent)
        if count == 0:
            return ()
        mask = self.merged.mask(parent, name)
        if mask == 0:
            return ()
        unmarked = mask != EVERYWHERE and self.merged.mask(parent, b".wh." + name) == 0
        bases = parent.lowers
        found = []
        for position in range(count) if mask == EVERYWHERE else positions(mask, count):
            base = <Real>bases[position]
            answer = self._ask(base, name, False, &dir_fd, &one)
            if answer == UNDECIDED or answer == HIDDEN:
                return None
            if answer == GONE:
                continue
            if not S_ISDIR(one.st_mode):
                if found:
                    break
                if S_ISREG(one.st_mode) and self._may_be_marked(dir_fd, name):
                    return None
                st[0] = one
                return (Real(base.layer, base, name),)
            real = Real(base.layer, base, name)
            if not found:
                st[0] = one
            found.append(real)
            if position + 1 == count and (base.layer is self.lowest or not self.follow_redirects):
                break
            if self._may_be_marked(dir_fd, name) or self._ends(name, dir_fd, unmarked):
                return None
        return tuple(found)

    cdef bint _ends(self, bytes name, int dir_fd, bint unmarked) except -1:
        """Whether an AUFS-style mark beside or in a directory may end the stack there.

        There is none beside it where it is said to be `unmarked`. What is in it is asked without opening it, as most
        directories that are listed are not entered.
        """
        cdef stat mark
        cdef char path[LONGEST + 1 + 12 + 1]
        if len(name) > LONGEST:
            return True
        if not unmarked:
            memcpy(path, b".wh.", 4)
            memcpy(path + 4, <const char*>name, len(name) + 1)
            if fstatat(dir_fd, path, &mark, AT_SYMLINK_NOFOLLOW) == 0 or errno != ENOENT:
                return True
        memcpy(path, <const char*>name, len(name))
        memcpy(path + len(name), b"/.wh..wh..opq", 14)
        return fstatat(dir_fd, path, &mark, AT_SYMLINK_NOFOLLOW) == 0 or errno != ENOENT

    cdef object _new(self, Node parent, bytes name, stat* st, stat* numbered, Real upper, tuple lowers):
        """The new node of what was found, numbered as `numbered`; None where it may be a known one's other name."""
        cdef Node node
        number = self.numbers.number(numbered.st_dev, numbered.st_ino)
        if not S_ISDIR(st.st_mode) and (st.st_nlink > 1 or number in self.nodes.by_id):
            return None
        node = Node(st.st_mode & FORMAT, parent, name, upper, lowers)
        if upper is not None:
            node.upper_ino = st.st_ino
        self.nodes.add(node, number)
        if parent.children is None:
            parent.children = {}
        parent.children[name] = node
        self.shown(node, st)
        return node

    cdef Node prepared(self, Node parent, bytes name, record* found):
        """As entry, of what was read ahead; None where a look is needed all the same."""
        cdef Real base
        if (
            found is NULL
            or found.marked
            or parent.upper is not None
            or type(parent.below) is not Real
            or parent.removed
            or len(name) > LONGEST
            or (parent.children is not None and name in parent.children)
        ):
            return None
        base = <Real>parent.below
        if S_ISDIR(found.st.st_mode) and base.layer is not self.lowest and self.follow_redirects:
            return None
        return self._new(parent, name, &found.st, &found.st, None, (Real(base.layer, base, name),))

    cdef list names(self, Node node):
        """All names in a directory of one layer; None where other layers or whiteouts have a part in it."""
        if node.removed or node.pinned >= 0 or lower_count(node) + (node.upper is not None) != 1:
            return None
        return self._listed(topmost(node))

    def merge_layer(self, fs, Real real, dict shown, set hidden):
        """As core's, which is left a directory that may hide something."""
        cdef list names = self._listed(real)
        if names is None:
            return merge_layer(fs, real, shown, hidden)
        for name in names:
            if name not in hidden:
                shown[name] = None
        return names

    cdef list _listed(self, Real real):
        """All names in a directory; None where one may hide something, or it can't be read."""
        cdef char keys[KEYS]
        cdef int dir_fd = self.dirs.fd(real)
        cdef Py_ssize_t length = list_xattrs(dir_fd, b".", keys, KEYS)
        if length < 0 and errno != EOPNOTSUPP:
            return None
        if length > 0 and memmem(keys, length, <const char*>self.opaque, len(self.opaque)) != NULL:
            return None
        cdef int fd = openat(dir_fd, b".", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
        if fd < 0:
            return None
        try:
            return plain_names(fd)
        finally:
            close(fd)

    cdef bint attributes(self, Node node, stat* st) except -1:
        """Read the attributes of a node as the mount shows them; False where core has to."""
        return self.as_stored and self.stored(node, st) and self.shown(node, st)

    cdef bint stored(self, Node node, stat* st) except -1:
        """Read the attributes of a node as its layer has them; False, and errno says why, where that fails."""
        cdef Real real
        if node.pinned >= 0:
            return fstat(node.pinned, st) == 0
        real = topmost(node)
        if real.parent is None:
            return fstat(real.layer.fd, st) == 0
        return fstatat(self.dirs.fd(real.parent), real.name, st, AT_SYMLINK_NOFOLLOW) == 0

    cdef int open(self, Node node, stat* st) except? -1:
        """A new descriptor of a lower file's data for reading, and its attributes; -1 where core has to open it."""
        cdef Real real
        cdef int fd
        if not self.still(node):
            return -1
        real = topmost(node)
        # What has taken the file's place since, behind our back, may be a link or block.
        fd = openat(self.dirs.fd(real.parent), real.name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC)
        if fd >= 0 and (fstat(fd, st) != 0 or not S_ISREG(st.st_mode)):
            close(fd)
            return -1
        return fd

    cdef bint still(self, Node node):
        """Whether a node's data are those of its one lower file, which nothing but a copy-up replaces."""
        return (
            node.kind == REGULAR
            and node.upper is None
            and node.pinned < 0
            and lower_count(node) == 1
            and self.for_ever
        )

    cdef bint birth(self, Node node, int64_t* seconds, uint32_t* nanoseconds) except -1:
        """When the real object was made (statx(2)); False where its filesystem doesn't say."""
        cdef statx_buf found
        cdef Real real
        cdef int result
        if node.pinned >= 0:
            result = read_statx(node.pinned, b"", AT_EMPTY_PATH, STATX_BTIME, &found)
        else:
            real = topmost(node)
            if real.parent is None:
                result = read_statx(real.layer.fd, b"", AT_EMPTY_PATH, STATX_BTIME, &found)
            else:
                result = read_statx(self.dirs.fd(real.parent), real.name, AT_SYMLINK_NOFOLLOW, STATX_BTIME, &found)
        if result != 0 or not found.stx_mask & STATX_BTIME:
            return False
        seconds[0], nanoseconds[0] = found.stx_btime.tv_sec, found.stx_btime.tv_nsec
        return True

    cdef bint unprotected(self, Node node) except -1:
        """Whether a node is neither immutable nor append-only, as core's protection has it."""
        cdef statx_buf found
        cdef Real real
        cdef int dir_fd
        if node.protection:
            return node.protection == KNOWN
        real = topmost(node)
        if node.pinned < 0 and real.parent is not None:
            dir_fd = self.dirs.fd(real.parent)
            if (
                read_statx(dir_fd, real.name, AT_SYMLINK_NOFOLLOW, STATX_TYPE, &found) == 0
                and (not found.stx_attributes & PROTECTED or real.layer in self.fs.flagless)
                and (node.upper is None or get_xattr(dir_fd, real.name, self.protattr, NULL, 0) < 0 and errno == ENODATA)
            ):
                node.protection = KNOWN
                return True
        return protection_of(self.fs, node) == 0

    cdef bint shown(self, Node node, stat* st):
        """Make the real attributes of a node those the mount shows; False where core has to."""
        if node.removed or node.indexed or node.metacopy:
            return False
        if node.kind == DIRECTORY:
            if self.static_nlink or lower_count(node) + (node.upper is not None) > 1:
                st.st_nlink = 1
        elif lower_count(node) > 1:
            return False
        return True

    cdef Py_ssize_t xattr(self, Node node, bytes key, char* value, size_t size) except? -1:
        """getxattr(2) of a node: the length, or minus the error number; minus ENOSYS where core has to."""
        cdef Py_ssize_t length
        cdef Real real
        if not key.startswith(b"security.") or key == PRIVILEGED_OVERRIDE_KEY:
            return -ENOSYS
        if node.pinned >= 0:
            # It may be O_PATH.
            return -ENOSYS
        real = topmost(node)
        if real.parent is None:
            return -ENOSYS
        length = get_xattr(self.dirs.fd(real.parent), real.name, key, value, size)
        return length if length >= 0 else -errno

    cdef bint bare(self, Node node) except -1:
        """Whether a node has no extended attribute; False where core has to look, too."""
        cdef Real real
        cdef char key
        if node.pinned >= 0:
            return False
        real = node.upper if node.upper is not None else <Real>node.lowers[0]
        if real.parent is None:
            return False
        return list_xattrs(self.dirs.fd(real.parent), real.name, &key, 0) == 0

    cdef int _ask(self, Real base, bytes name, bint markless, int* dir_fd, stat* st) except -2:
        """What the directory `base` of one layer has under a name, HIDDEN for a whiteout; `markless` as of a node."""
        cdef stat mark
        cdef char hidden[256]
        dir_fd[0] = self.dirs.fd(base)
        if fstatat(dir_fd[0], name, st, AT_SYMLINK_NOFOLLOW) != 0:
            if errno != ENOENT:
                return UNDECIDED
            if markless:
                return GONE
            memcpy(hidden, b".wh.", 4)
            memcpy(hidden + 4, <const char*>name, len(name) + 1)
            if fstatat(dir_fd[0], hidden, &mark, AT_SYMLINK_NOFOLLOW) == 0 or errno != ENOENT:
                return UNDECIDED
            return GONE
        if S_ISCHR(st.st_mode) and st.st_rdev == 0:
            return HIDDEN
        if st.st_size == 0 and S_ISREG(st.st_mode) and self._may_be_marked(dir_fd[0], name):
            return UNDECIDED
        return FOUND

    cdef bint _markless(self, Node node) except -1:
        """Whether to look for AUFS-style marks in an upper directory no more, where a name was looked for in vain.

        After some of these it is listed once. Marks come in behind the mount's back alone, and by a rename that has no
        other way, which takes the knowledge back.
        """
        cdef stat st
        cdef int dir_fd
        cdef int fd
        if not self.for_ever or node.pinned >= 0:
            return False
        left = self.upper_misses.get(node)
        if left is None:
            if fstat(self.dirs.fd(node.upper), &st) != 0:
                return False
            if len(self.upper_misses) >= MISSED_DIRS:
                self.upper_misses.clear()
            left = 1 + st.st_size // BYTES_A_MISS
        self.upper_misses[node] = left - 1
        if left != 1:
            return False
        dir_fd = self.dirs.fd(node.upper)
        fd = openat(dir_fd, b".", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
        if fd < 0:
            return False
        try:
            return holds_no_marks(fd)
        finally:
            close(fd)

    cdef bint _may_be_marked(self, int dir_fd, bytes name):
        """Whether a mark is among an object's xattrs, the overlay's or fuse-overlayfs's, or can't be told not to be."""
        cdef char keys[KEYS]
        cdef Py_ssize_t length = list_xattrs(dir_fd, name, keys, KEYS)
        if length < 0:
            return errno != EOPNOTSUPP
        return length > 0 and (
            memmem(keys, length, <const char*>self.prefix, len(self.prefix)) != NULL
            or memmem(keys, length, <const char*>self.foreign_opaque, len(self.foreign_opaque)) != NULL
        )


cdef inline Py_ssize_t lower_count(Node node):
    """How many lowers a node has."""
    if node.below is None:
        return 0
    return len(<tuple>node.below) if type(node.below) is tuple else 1


cdef inline Real topmost(Node node):
    """Where a node's attributes live."""
    if node.upper is not None:
        return node.upper
    return <Real>(<tuple>node.below)[0] if type(node.below) is tuple else <Real>node.below


cdef list plain_names(int fd):
    """The names in the directory open at `fd`; None if one of them may be a whiteout or can't be read."""
    cdef char buffer[LISTING]
    cdef dirent64* one
    cdef Py_ssize_t length
    cdef Py_ssize_t at
    found = []
    while True:
        length = getdents64(fd, buffer, LISTING)
        if length <= 0:
            return found if length == 0 else None
        at = 0
        while at < length:
            one = <dirent64*>(buffer + at)
            at += one.d_reclen
            if one.d_type == DT_CHR or one.d_type == DT_UNKNOWN:
                return None
            if one.d_name[0] == c".":
                if one.d_name[1] == 0 or (one.d_name[1] == c"." and one.d_name[2] == 0):
                    continue
                if strncmp(one.d_name, b".wh.", 4) == 0:
                    return None
            found.append(<bytes>one.d_name)


cdef bint holds_no_marks(int fd):
    """Whether the directory open at `fd` can be read, and no name in it begins like an AUFS-style mark."""
    cdef char buffer[LISTING]
    cdef dirent64* one
    cdef Py_ssize_t length
    cdef Py_ssize_t at
    while True:
        length = getdents64(fd, buffer, LISTING)
        if length <= 0:
            return length == 0
        at = 0
        while at < length:
            one = <dirent64*>(buffer + at)
            at += one.d_reclen
            if strncmp(one.d_name, b".wh.", 4) == 0:
                return False
