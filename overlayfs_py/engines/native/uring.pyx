# cython: language_level=3, annotation_typing=False
"""Requests fetched and answered through io_uring: one ring and one pinned thread a CPU (Linux 6.14).

The kernel puts a request on the ring of the CPU it was made on, where the thread that serves it waits: no processor has
to be woken for it. An answer and the wait for the next request are one system call. Forgets and interrupts still come
over /dev/fuse. Source: Documentation/filesystems/fuse/fuse-io-uring.rst, include/uapi/linux/fuse.h.
"""

import errno
import os
import time
from _queue import SimpleQueue

from libc.errno cimport errno as c_errno
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.session cimport Request, Session

from overlayfs_py.engines.native.direct import own_umask
from overlayfs_py.journal import Journal
from overlayfs_py.records import deque

cdef extern from *:
    """
    #include <linux/io_uring.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <unistd.h>

    static long ring_setup(unsigned entries, struct io_uring_params *params) {
        return syscall(__NR_io_uring_setup, entries, params);
    }
    static long ring_enter(int fd, unsigned submit, unsigned wait, unsigned flags) {
        return syscall(__NR_io_uring_enter, fd, submit, wait, flags, (void *)0, 0);
    }
    static long ring_message(const struct io_uring_sqe *message) {
        return syscall(__NR_io_uring_register, -1, 31 /* IORING_REGISTER_SEND_MSG_RING, Linux 6.13 */, message, 1);
    }
    static unsigned load_acquire(unsigned *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
    static void store_release(unsigned *at, unsigned value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }
    static void *sqe_command(struct io_uring_sqe *sqe) { return (char *)sqe + 48; }
    """
    cdef struct io_sqring_offsets:
        uint32_t head
        uint32_t tail
        uint32_t ring_mask
        uint32_t array

    cdef struct io_cqring_offsets:
        uint32_t head
        uint32_t tail
        uint32_t ring_mask
        uint32_t cqes

    cdef struct io_uring_params:
        uint32_t sq_entries
        uint32_t cq_entries
        uint32_t flags
        uint32_t features
        io_sqring_offsets sq_off
        io_cqring_offsets cq_off

    cdef struct io_uring_sqe:
        uint8_t opcode
        int32_t fd
        uint64_t addr
        uint32_t len
        uint32_t cmd_op
        uint64_t user_data

    cdef struct io_uring_cqe:
        uint64_t user_data
        int32_t res

    cdef struct iovec:
        void* iov_base
        size_t iov_len

    enum:
        IORING_SETUP_SQE128
        IORING_SETUP_SINGLE_ISSUER
        IORING_SETUP_COOP_TASKRUN
        IORING_ENTER_GETEVENTS
        IORING_OP_URING_CMD
        IORING_OP_MSG_RING
        IORING_OFF_SQ_RING
        IORING_OFF_CQ_RING
        IORING_OFF_SQES
        MAP_SHARED
        MAP_PRIVATE
        MAP_POPULATE
        MAP_ANONYMOUS
        PROT_READ
        PROT_WRITE

    void* MAP_FAILED
    void* c_mmap "mmap"(void* at, size_t size, int protection, int flags, int fd, long offset) nogil
    int c_munmap "munmap"(void* at, size_t size) nogil
    long ring_setup(unsigned int entries, io_uring_params* params) nogil
    long ring_enter(int fd, unsigned int submit, unsigned int wait, unsigned int flags) nogil
    long ring_message(const io_uring_sqe* message) nogil
    unsigned int load_acquire(uint32_t* at) nogil
    void store_release(uint32_t* at, unsigned int value) nogil
    void* sqe_command(io_uring_sqe* sqe) nogil

log = Journal(__name__)

cdef enum:
    CMD_REGISTER = 1
    CMD_COMMIT_AND_FETCH = 2
    SEGMENTS = 2
    SQE_SIZE = 128
    HEADER_SIZE = 128

# struct fuse_uring_ent_in_out
cdef struct entry_in_out:
    uint64_t flags
    uint64_t commit_id
    uint32_t payload_sz
    uint32_t padding
    uint64_t reserved

# struct fuse_uring_req_header
cdef struct request_header:
    char in_out[HEADER_SIZE]
    char op_in[HEADER_SIZE]
    entry_in_out entry

# struct fuse_uring_cmd_req
cdef struct command:
    uint64_t flags
    uint64_t commit_id
    uint16_t qid
    uint8_t padding[6]

DEPTH = 16
"""Requests of one CPU that the kernel may have under way in its ring; more of them wait in the kernel."""

_AGAIN = 0.001  # seconds until what the kernel had no memory for is tried again
_WAKE = 0  # user_data of the message that other threads wake the ring with; entries count from 1


cdef class Entry(Request):
    """One place in a ring: the memory through which requests come and answers go."""

    cdef char* memory
    cdef size_t size_in_all
    cdef request_header* header
    cdef char* payload
    cdef iovec segments[SEGMENTS]
    cdef uint64_t number
    cdef uint64_t commit_id

    def __cinit__(self, uint64_t number, size_t payload_size):
        cdef void* memory
        self.number = number
        self.size_in_all = 4096 + payload_size
        # Pages that no request has needed yet cost nothing.
        memory = c_mmap(NULL, self.size_in_all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if memory == MAP_FAILED:
            raise MemoryError()
        self.memory = <char*>memory
        self.header = <request_header*>memory
        self.payload = self.memory + 4096
        self.room = payload_size
        self.segments[0].iov_base, self.segments[0].iov_len = memory, sizeof(request_header)
        self.segments[1].iov_base, self.segments[1].iov_len = self.payload, payload_size

    def __dealloc__(self):
        if self.memory is not NULL:
            c_munmap(self.memory, self.size_in_all)

    cdef bint parse(self):
        """Find the parts of the request that has come; False where its lengths don't fit each other."""
        cdef protocol.in_header* head = <protocol.in_header*>self.header.in_out
        cdef size_t extensions = 8 * <size_t>head.total_extlen
        self.commit_id = self.header.entry.commit_id
        self.unique = head.unique
        self.nodeid = head.nodeid
        self.opcode = head.opcode
        self.uid, self.gid, self.pid = head.uid, head.gid, head.pid
        self.op = self.header.op_in
        self.data = self.payload
        self.out = self.payload
        self.size = self.header.entry.payload_sz
        if self.size > self.room or extensions > self.size:
            return False
        self.size -= extensions
        self.extensions = self.payload + self.size
        self.extensions_size = extensions
        return True

    cdef void answer(self):
        cdef protocol.out_header* head = <protocol.out_header*>self.header.in_out
        cdef uint32_t length = 0 if self.error else <uint32_t>self.length
        head.len = <uint32_t>sizeof(protocol.out_header) + length
        head.error = -self.error
        head.unique = self.unique
        self.header.entry.payload_sz = length

    cdef bint serve(self, Session session) except -1:
        """Serve the request that has come; False where its answer comes later, through the transport's reply()."""
        if not self.parse():
            log.error("a request of opcode %d that makes no sense", self.opcode)
            self.error, self.length = errno.EIO, 0
        elif not session.handle(self):
            return False
        self.answer()
        return True


cdef class Loopback:
    """A place in a ring without a kernel: what may stand there is the caller's choice, as is the thread that serves it."""

    cdef Session session
    cdef Entry entry
    cdef object answered

    def __init__(self, Session session):
        self.session = session
        self.entry = Entry(1, session.payload)
        self.entry.transport = self
        self.answered = SimpleQueue()
        own_umask(session)

    def reply(self, Entry entry):
        entry.answer()
        self.answered.put(None)

    def exchange(self, bytes header, bytes payload):
        """Serve a request, in the thread that made this: struct fuse_uring_req_header, and what is in the other memory.

        Returns what the kernel would then find of both. Raises ValueError for what is longer than its place.
        """
        if <size_t>len(header) != sizeof(request_header) or <size_t>len(payload) > self.entry.room:
            raise ValueError("a request of another size than a ring's")
        memcpy(self.entry.header, <char*>header, sizeof(request_header))
        memcpy(self.entry.payload, <char*>payload, len(payload))
        if not self.entry.serve(self.session):
            self.answered.get()
        size = min(<size_t>self.entry.header.entry.payload_sz, self.entry.room)
        return (<char*>self.entry.header)[: sizeof(request_header)], self.entry.payload[:size]


cdef class Ring:
    """The queue of one CPU, and the loop that serves it."""

    cdef Session session
    cdef int fuse_fd
    cdef int queue
    cdef object cpu
    cdef int fd
    cdef list entries
    cdef object finished
    cdef io_uring_params params
    cdef char* sq
    cdef char* cq
    cdef char* sqes
    cdef size_t sq_size
    cdef size_t cq_size
    cdef size_t sqes_size
    cdef unsigned int pending
    cdef bint ended

    def __init__(self, int fuse_fd, int queue, object cpu):
        """Make the ring of the kernel's `queue`, to be served by a thread pinned to `cpu`, on any where that is None.

        Raises OSError where the kernel makes no such rings (ENOSYS, EPERM, EINVAL, ENOMEM, EMFILE).
        """
        self.fuse_fd = fuse_fd
        self.queue = queue
        self.cpu = cpu
        self.finished = deque()
        self.fd = -1
        memset(&self.params, 0, sizeof(self.params))
        self.params.flags = IORING_SETUP_SQE128
        try:
            self._set_up()
        except OSError:
            self.close()
            raise

    cdef _set_up(self):
        self.fd = self._checked(ring_setup(2 * DEPTH, &self.params))
        os.set_inheritable(self.fd, False)
        self.sq_size = self.params.sq_off.array + self.params.sq_entries * sizeof(uint32_t)
        self.cq_size = self.params.cq_off.cqes + self.params.cq_entries * sizeof(io_uring_cqe)
        self.sqes_size = self.params.sq_entries * SQE_SIZE
        self.sq = self._map(self.sq_size, IORING_OFF_SQ_RING)
        self.cq = self._map(self.cq_size, IORING_OFF_CQ_RING)
        self.sqes = self._map(self.sqes_size, IORING_OFF_SQES)
        # The first message comes to nothing: it shows that there may be some.
        self._checked(self._wake())

    cdef long _checked(self, long result) except -1:
        if result < 0:
            raise OSError(c_errno, os.strerror(c_errno))
        return result

    cdef char* _map(self, size_t size, long offset) except NULL:
        cdef void* at = c_mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, self.fd, offset)
        if at == MAP_FAILED:
            raise OSError(c_errno, os.strerror(c_errno))
        return <char*>at

    def __dealloc__(self):
        if self.sq is not NULL:
            c_munmap(self.sq, self.sq_size)
        if self.cq is not NULL:
            c_munmap(self.cq, self.cq_size)
        if self.sqes is not NULL:
            c_munmap(self.sqes, self.sqes_size)

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    cdef io_uring_sqe* _next(self, uint64_t user_data):
        """A cleared entry of the submission queue, which has room for all that can be under way."""
        cdef uint32_t* tail = <uint32_t*>(self.sq + self.params.sq_off.tail)
        cdef uint32_t mask = (<uint32_t*>(self.sq + self.params.sq_off.ring_mask))[0]
        cdef uint32_t* array = <uint32_t*>(self.sq + self.params.sq_off.array)
        cdef uint32_t index = tail[0] & mask
        cdef io_uring_sqe* sqe = <io_uring_sqe*>(self.sqes + index * SQE_SIZE)
        memset(sqe, 0, SQE_SIZE)
        sqe.user_data = user_data
        array[index] = index
        store_release(tail, tail[0] + 1)
        self.pending += 1
        return sqe

    cdef void _queue(self, Entry entry, uint32_t what):
        cdef io_uring_sqe* sqe = self._next(entry.number)
        cdef command* request = <command*>sqe_command(sqe)
        sqe.opcode = IORING_OP_URING_CMD
        sqe.fd = self.fuse_fd
        sqe.cmd_op = what
        request.qid = self.queue
        if what == CMD_REGISTER:
            sqe.addr = <uint64_t>&entry.segments[0]
            sqe.len = SEGMENTS
        else:
            request.commit_id = entry.commit_id

    cdef long _wake(self):
        """Have the thread of the ring look what has been finished; from any thread, and without a descriptor for it."""
        cdef io_uring_sqe message
        memset(&message, 0, sizeof(message))
        message.opcode = IORING_OP_MSG_RING
        message.fd = self.fd
        # Its other fields, nought, are those of the completion: _WAKE, and a result.
        return ring_message(&message)

    def reply(self, Entry entry):
        """Answer a request that took longer; from any thread."""
        self.finished.append(entry)
        if self._wake() >= 0:
            return
        log.error("a ring can't be woken, which is tried again: %s", os.strerror(c_errno))
        # The kernel had no memory for the message. Nothing else need ever wake the ring, and who asks waits on.
        while not self.ended:
            time.sleep(_AGAIN)
            if self._wake() >= 0:
                return

    def serve(self, Session session):
        """Serve until the connection ends; in the thread that is to be the ring's.

        Raises OSError where the kernel does not take the ring after all.
        """
        cdef Entry entry
        self.session = session
        own_umask(session)
        self.entries = [Entry(number + 1, session.payload) for number in range(DEPTH)]
        try:
            if self.cpu is not None:
                os.sched_setaffinity(0, {self.cpu})
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # that processor has just been switched off: whichever is free serves its ring
        for entry in self.entries:
            entry.transport, entry.pinned = self, True
            self._queue(entry, CMD_REGISTER)
        try:
            while not self.ended:
                self._enter()
                self._reap()
        finally:
            self.ended = True

    cdef _enter(self):
        """Submit what is queued, and wait until something has come; for no more than a moment where some of it is left."""
        cdef unsigned int submit = self.pending
        cdef long result
        cdef int number
        with nogil:
            result = ring_enter(self.fd, submit, 1, IORING_ENTER_GETEVENTS)
            number = c_errno
        if result > 0:
            self.pending -= <unsigned int>result
        elif result < 0 and number not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
            raise OSError(number, os.strerror(number))
        if self.pending:
            # There was no memory for what is left, which stays queued; nor has it waited.
            time.sleep(_AGAIN)

    cdef _reap(self):
        """Serve every request that has come."""
        cdef uint32_t* head = <uint32_t*>(self.cq + self.params.cq_off.head)
        cdef uint32_t* tail = <uint32_t*>(self.cq + self.params.cq_off.tail)
        cdef uint32_t mask = (<uint32_t*>(self.cq + self.params.cq_off.ring_mask))[0]
        cdef io_uring_cqe* cqes = <io_uring_cqe*>(self.cq + self.params.cq_off.cqes)
        cdef io_uring_cqe cqe
        while head[0] != load_acquire(tail):
            cqe = cqes[head[0] & mask]
            store_release(head, head[0] + 1)
            if cqe.user_data == _WAKE:
                self._answer_finished()
            elif cqe.res < 0:
                self._lost(cqe.res)
            else:
                self._serve_one(<Entry>self.entries[cqe.user_data - 1])

    cdef _lost(self, int32_t result):
        if -result not in (errno.ENOTCONN, errno.ECANCELED, errno.ENODEV, errno.ECONNABORTED):
            raise OSError(-result, f"an entry of a ring was refused: {os.strerror(-result)}")
        self.ended = True

    cdef _answer_finished(self):
        cdef Entry entry
        while self.finished:
            entry = self.finished.popleft()
            entry.answer()
            self._queue(entry, CMD_COMMIT_AND_FETCH)

    cdef _serve_one(self, Entry entry):
        if entry.serve(self.session):
            self._queue(entry, CMD_COMMIT_AND_FETCH)
