# The FUSE kernel protocol as far as this engine speaks it: 7.31 to 7.45. Source: include/uapi/linux/fuse.h.
# All structures are in the machine's byte order and have no padding but what is written out.

from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t

cdef enum:
    KERNEL_VERSION = 7
    KERNEL_MINOR_VERSION = 45
    OLDEST_MINOR_VERSION = 31

cdef enum:
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53
    OPCODES = 54

# Flags of INIT, the second word shifted up by 32.
cdef enum:
    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    HAS_IOCTL_DIR = 1 << 11
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    POSIX_ACL = 1 << 20
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30

# Flags of single requests.
cdef enum:
    FATTR_MODE = 1 << 0
    FATTR_UID = 1 << 1
    FATTR_GID = 1 << 2
    FATTR_SIZE = 1 << 3
    FATTR_ATIME = 1 << 4
    FATTR_MTIME = 1 << 5
    FATTR_ATIME_NOW = 1 << 7
    FATTR_MTIME_NOW = 1 << 8
    FATTR_CTIME = 1 << 10
    FATTR_KILL_SUIDGID = 1 << 11
    WRITE_KILL_SUIDGID = 1 << 2
    SETXATTR_ACL_KILL_SGID = 1 << 0
    FSYNC_FDATASYNC = 1 << 0
    OPEN_KILL_SUIDGID = 1 << 0
    FOPEN_KEEP_CACHE = 1 << 1
    FOPEN_NOFLUSH = 1 << 5
    FOPEN_PASSTHROUGH = 1 << 7

# What an unasked message says, where an answer has its error.
cdef enum:
    NOTIFY_INVAL_INODE = 2
    NOTIFY_PRUNE = 9

cdef enum:
    MIN_READ_BUFFER = 8192
    IN_HEADER_SIZE = 40
    OUT_HEADER_SIZE = 16

cdef struct in_header:
    uint32_t len
    uint32_t opcode
    uint64_t unique
    uint64_t nodeid
    uint32_t uid
    uint32_t gid
    uint32_t pid
    uint16_t total_extlen
    uint16_t padding

cdef struct out_header:
    uint32_t len
    int32_t error
    uint64_t unique

cdef struct attr_t:
    uint64_t ino
    uint64_t size
    uint64_t blocks
    uint64_t atime
    uint64_t mtime
    uint64_t ctime
    uint32_t atimensec
    uint32_t mtimensec
    uint32_t ctimensec
    uint32_t mode
    uint32_t nlink
    uint32_t uid
    uint32_t gid
    uint32_t rdev
    uint32_t blksize
    uint32_t flags

cdef struct entry_out:
    uint64_t nodeid
    uint64_t generation
    uint64_t entry_valid
    uint64_t attr_valid
    uint32_t entry_valid_nsec
    uint32_t attr_valid_nsec
    attr_t attr

cdef struct attr_out:
    uint64_t attr_valid
    uint32_t attr_valid_nsec
    uint32_t dummy
    attr_t attr

cdef struct open_in:
    uint32_t flags
    uint32_t open_flags

cdef struct release_in:
    uint64_t fh
    uint32_t flags
    uint32_t release_flags
    uint64_t lock_owner

cdef struct open_out:
    uint64_t fh
    uint32_t open_flags
    int32_t backing_id

# Those of statx(2) that the kernel takes from an answer.
cdef enum:
    STATX_BASIC_STATS = 0x7FF
    STATX_BTIME = 0x800

cdef struct statx_in:
    uint32_t getattr_flags
    uint32_t reserved
    uint64_t fh
    uint32_t sx_flags
    uint32_t sx_mask

cdef struct sx_time:
    int64_t tv_sec
    uint32_t tv_nsec
    int32_t reserved

cdef struct statx_t:
    uint32_t mask
    uint32_t blksize
    uint64_t attributes
    uint32_t nlink
    uint32_t uid
    uint32_t gid
    uint16_t mode
    uint16_t spare0
    uint64_t ino
    uint64_t size
    uint64_t blocks
    uint64_t attributes_mask
    sx_time atime
    sx_time btime
    sx_time ctime
    sx_time mtime
    uint32_t rdev_major
    uint32_t rdev_minor
    uint32_t dev_major
    uint32_t dev_minor
    uint64_t spare2[14]

cdef struct statx_out:
    uint64_t attr_valid
    uint32_t attr_valid_nsec
    uint32_t flags
    uint64_t spare[2]
    statx_t stat

cdef struct forget_one:
    uint64_t nodeid
    uint64_t nlookup

cdef struct batch_forget_in:
    uint32_t count
    uint32_t dummy

cdef struct setattr_in:
    uint32_t valid
    uint32_t padding
    uint64_t fh
    uint64_t size
    uint64_t lock_owner
    uint64_t atime
    uint64_t mtime
    uint64_t ctime
    uint32_t atimensec
    uint32_t mtimensec
    uint32_t ctimensec
    uint32_t mode
    uint32_t unused4
    uint32_t uid
    uint32_t gid
    uint32_t unused5

cdef struct mknod_in:
    uint32_t mode
    uint32_t rdev
    uint32_t umask
    uint32_t padding

cdef struct mkdir_in:
    uint32_t mode
    uint32_t umask

cdef struct rename_in:
    uint64_t newdir

cdef struct rename2_in:
    uint64_t newdir
    uint32_t flags
    uint32_t padding

cdef struct link_in:
    uint64_t oldnodeid

cdef struct create_in:
    uint32_t flags
    uint32_t mode
    uint32_t umask
    uint32_t open_flags

cdef struct read_in:
    uint64_t fh
    uint64_t offset
    uint32_t size
    uint32_t read_flags
    uint64_t lock_owner
    uint32_t flags
    uint32_t padding

cdef struct write_in:
    uint64_t fh
    uint64_t offset
    uint32_t size
    uint32_t write_flags
    uint64_t lock_owner
    uint32_t flags
    uint32_t padding

cdef struct write_out:
    uint32_t size
    uint32_t padding

cdef struct fsync_in:
    uint64_t fh
    uint32_t fsync_flags
    uint32_t padding

cdef struct setxattr_in:
    uint32_t size
    uint32_t flags
    uint32_t setxattr_flags
    uint32_t padding

cdef struct getxattr_in:
    uint32_t size
    uint32_t padding

cdef struct getxattr_out:
    uint32_t size
    uint32_t padding

cdef struct kstatfs:
    uint64_t blocks
    uint64_t bfree
    uint64_t bavail
    uint64_t files
    uint64_t ffree
    uint32_t bsize
    uint32_t namelen
    uint32_t frsize
    uint32_t padding
    uint32_t spare[6]

cdef struct fallocate_in:
    uint64_t fh
    uint64_t offset
    uint64_t length
    uint32_t mode
    uint32_t padding

cdef struct lseek_in:
    uint64_t fh
    uint64_t offset
    uint32_t whence
    uint32_t padding

cdef struct lseek_out:
    uint64_t offset

cdef struct copy_file_range_in:
    uint64_t fh_in
    uint64_t off_in
    uint64_t nodeid_out
    uint64_t fh_out
    uint64_t off_out
    uint64_t len
    uint64_t flags

cdef struct copy_file_range_out:
    uint64_t bytes_copied

cdef struct ioctl_in:
    uint64_t fh
    uint32_t flags
    uint32_t cmd
    uint64_t arg
    uint32_t in_size
    uint32_t out_size

cdef struct ioctl_out:
    int32_t result
    uint32_t flags
    uint32_t in_iovs
    uint32_t out_iovs

cdef struct dirent:
    uint64_t ino
    uint64_t off
    uint32_t namelen
    uint32_t type

cdef struct init_in:
    uint32_t major
    uint32_t minor
    uint32_t max_readahead
    uint32_t flags
    uint32_t flags2
    uint32_t unused[11]

cdef struct init_out:
    uint32_t major
    uint32_t minor
    uint32_t max_readahead
    uint32_t flags
    uint16_t max_background
    uint16_t congestion_threshold
    uint32_t max_write
    uint32_t time_gran
    uint16_t max_pages
    uint16_t map_alignment
    uint32_t flags2
    uint32_t max_stack_depth
    uint16_t request_timeout
    uint16_t unused[11]
