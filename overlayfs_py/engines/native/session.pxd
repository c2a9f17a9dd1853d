from libc.stdint cimport int64_t, uint32_t, uint64_t

from overlayfs_py.engines.native.ahead cimport Ahead
from overlayfs_py.engines.native.closing cimport Closing
from overlayfs_py.engines.native.direct cimport Direct
from overlayfs_py.engines.native.export cimport Generations
from overlayfs_py.engines.native.pace cimport Pace
from overlayfs_py.engines.native.pipes cimport Pipes
from overlayfs_py.engines.native.passthrough cimport Passthrough
from overlayfs_py.engines.native.plain cimport Plain
from overlayfs_py.engines.native.prune cimport Pruning
from overlayfs_py.engines.native.warm cimport Warm


cdef class Request
cdef class Session

ctypedef Py_ssize_t (*Handler)(Session, Request) except -2

cdef enum:
    OPCODES = 64

    # What a handler answers whose answer comes later.
    DEFERRED = -1
    # What finishes an operation, that the rest of it, `Request.rest`, is to be done without the lock.
    UNFINISHED = -3

    # The handler takes the lock itself, or needs none.
    UNLOCKED = 1
    # It comes from someone who has the file open, or from the kernel itself: allow_root turns nobody away there.
    OPEN_TO_ALL = 2

cdef struct Row:
    Handler handler
    size_t op_size
    uint32_t how

# The timeout in seconds that stands for "for ever".
cdef uint64_t FOREVER

cdef void serves(uint32_t opcode, Handler handler, size_t op_size, uint32_t how)


cdef class Request:
    cdef uint64_t unique
    cdef uint64_t nodeid
    cdef uint32_t opcode
    cdef uint32_t uid
    cdef uint32_t gid
    cdef uint32_t pid
    # What the operation has: its own structure, and the names or bytes behind it.
    cdef char* op
    cdef char* data
    cdef size_t size
    cdef char* extensions
    cdef size_t extensions_size
    # Where the answer goes, behind its header.
    cdef char* out
    cdef size_t room
    cdef Py_ssize_t length
    cdef int error
    cdef object transport
    # What is still to be called for the answer's length, and with which arguments.
    cdef tuple rest
    # The descriptor that it came through, if that is one of /dev/fuse, and whether it has been answered there already.
    cdef int fuse_fd
    cdef bint sent
    # Whether the thread that serves it is the only one of its processor.
    cdef bint pinned

    cdef bytes name(self)
    cdef bytes entry_name(self)
    cdef object asker(self)
    cdef object in_group(self, Session session)
    cdef object caller(self, uint32_t umask)
    cdef Py_ssize_t do_rest(self) except -2


cdef size_t op_size(uint32_t opcode, Session session)
cdef Py_ssize_t never_ask() except -2


cdef class Session:
    cdef readonly object fs
    # The first descriptor of the connection.
    cdef int fuse_fd
    cdef object lock
    cdef object pool
    # Threads that read and write data, other ones than those of jobs, which may take long.
    cdef object movers
    # The one that waits until the kernel has sent what was changed through mappings.
    cdef object flushing
    cdef object running
    cdef object listings
    cdef Plain plain
    cdef Ahead ahead
    cdef Warm warm
    cdef Closing closing
    cdef readonly Pace pace
    cdef readonly Pipes pipes
    cdef Direct direct
    cdef Generations generations
    cdef readonly Pruning pruning
    cdef readonly Passthrough through
    cdef uint64_t timeout
    cdef uint32_t timeout_nsec
    cdef readonly size_t max_write
    # Bytes of the longest request, without its header, and of the longest answer.
    cdef readonly size_t payload
    cdef readonly object minor
    cdef bint want_uring
    cdef bint keeps_atimes
    cdef bint only_root
    # Until when writes are thought to wait for their disk; in nanoseconds of the clock that only goes forward.
    cdef int64_t writes_wait_until
    # Which root the kernel knows.
    cdef object beginning
    # The node whose capabilities were removed last, and by which process, until a change of attributes.
    cdef object capability_taken
    # Whether kernel and engine agreed in INIT on the longer structure of SETXATTR.
    cdef bint long_setxattr
    # The same of labels with what is made.
    cdef bint security_label
    # The same of rings.
    cdef readonly bint uring

    cdef bint handle(self, Request r)
    cdef fail(self, Request r, object error)
    cdef Py_ssize_t run(self, Request r, object steps, object finish) except -2
    cdef bint hand_over(self, Request r, run, arguments) except -1
    cdef ask_disk(self)
    cpdef object workers(self)
    cdef object advance(self, object steps)
    cdef object owns(self, Request r, object job)
    cdef object node(self, uint64_t node_id)
