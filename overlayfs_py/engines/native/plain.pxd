from libc.stdint cimport int64_t, uint32_t, uint64_t

from overlayfs_py.core.layers cimport DirCache, Numbers
from overlayfs_py.core.merged cimport MergedNames
from overlayfs_py.core.nodes cimport Node, NodeTable, Real


cdef extern from "<sys/stat.h>" nogil:
    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec
    struct stat:
        uint64_t st_dev
        uint64_t st_ino
        uint32_t st_mode
        uint64_t st_nlink
        uint32_t st_uid
        uint32_t st_gid
        uint64_t st_rdev
        int64_t st_size
        int64_t st_blksize
        int64_t st_blocks
        timespec st_atim
        timespec st_mtim
        timespec st_ctim
    int fstatat(int dir_fd, const char* path, stat* st, int flags)
    bint S_ISCHR(uint32_t mode)

cdef extern from "<fcntl.h>" nogil:
    int AT_SYMLINK_NOFOLLOW, O_CLOEXEC, O_DIRECTORY, O_NOFOLLOW, O_PATH, O_RDONLY
    int openat(int dir_fd, const char* path, int flags)

cdef extern from "<dirent.h>" nogil:
    struct dirent64:
        unsigned short d_reclen
        unsigned char d_type
        char* d_name
    Py_ssize_t getdents64(int fd, void* entries, size_t size)

cdef extern from "<string.h>" nogil:
    void* memmem(const void* haystack, size_t length, const void* needle, size_t needle_length)

cdef enum:
    KEYS = 1024  # bytes; whatever lists more is not plain
    LISTING = 32 << 10  # bytes

    DT_UNKNOWN = 0
    DT_CHR = 2

# What was read of an entry of a directory ahead of the question.
cdef struct record:
    stat st
    unsigned short length
    # Whether it may have one of the overlay's xattrs.
    unsigned char marked

cdef object ABSENT


cdef class Plain:
    cdef object fs
    cdef DirCache dirs
    cdef NodeTable nodes
    cdef Numbers numbers
    cdef MergedNames merged
    cdef bint follow_redirects
    # How often a name was looked for in vain in upper directories that may hold AUFS-style marks.
    cdef dict upper_misses
    cdef bytes prefix
    # fuse-overlayfs's xattr of a directory that hides what is below it.
    cdef bytes foreign_opaque
    # The xattr without which a directory has no whiteouts that are files.
    cdef bytes opaque
    # The xattr that an object has which is immutable or append-only.
    cdef bytes protattr
    # Whether attributes are shown as the layers have them.
    cdef bint as_stored
    cdef bint static_nlink
    # Whether layers change through the mount alone.
    cdef bint for_ever
    # The lowest layer: what a directory there is merged with is no question.
    cdef object lowest

    cdef object entry(self, Node parent, bytes name, stat* st)
    cdef Node prepared(self, Node parent, bytes name, record* found)
    cdef list names(self, Node node)
    cdef list _listed(self, Real real)
    cdef bint attributes(self, Node node, stat* st) except -1
    cdef bint stored(self, Node node, stat* st) except -1
    cdef int open(self, Node node, stat* st) except? -1
    cdef bint still(self, Node node)
    cdef bint birth(self, Node node, int64_t* seconds, uint32_t* nanoseconds) except -1
    cdef bint unprotected(self, Node node) except -1
    cdef bint shown(self, Node node, stat* st)
    cdef Py_ssize_t xattr(self, Node node, bytes key, char* value, size_t size) except? -1
    cdef bint bare(self, Node node) except -1
    cdef object _new(self, Node parent, bytes name, stat* st, stat* numbered, Real upper, tuple lowers)
    cdef tuple _lowers(self, Node parent, bytes name, stat* st)
    cdef bint _ends(self, bytes name, int dir_fd, bint unmarked) except -1
    cdef int _ask(self, Real base, bytes name, bint markless, int* dir_fd, stat* st) except -2
    cdef bint _markless(self, Node node) except -1
    cdef bint _may_be_marked(self, int dir_fd, bytes name)
