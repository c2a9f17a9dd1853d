# cython: language_level=3, annotation_typing=False
"""Requests read from /dev/fuse and answered there: one thread and one cloned descriptor a CPU, at least two."""

import errno
from fcntl import ioctl
import os
import struct

from libc.errno cimport EAGAIN, errno as c_errno
from libc.stdlib cimport free, malloc
from libc.stdint cimport int64_t, uint32_t
from posix.unistd cimport read, write

from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.pace cimport Pace, is_waiting, monotonic
from overlayfs_py.engines.native.session cimport Request, Session, op_size

from overlayfs_py.engines.native.direct import own_umask
from overlayfs_py.journal import Journal

log = Journal(__name__)

_FUSE_DEV_IOC_CLONE = 0x8004E500

cdef extern from "<fcntl.h>" nogil:
    int F_SETFL, O_NONBLOCK
    int fcntl(int fd, int command, ...)

cdef enum:
    HEADROOM = 64 << 10
    SPARE = 2

    # For so many nanoseconds the one thread that fetches looks for the next request before it sleeps.
    SOON = 40_000


cdef class Buffers(Request):
    """A request with memory of its own: it may outlive the read that brought it."""

    cdef char* inward
    cdef char* outward
    cdef size_t capacity

    def __cinit__(self, Py_ssize_t capacity):
        self.capacity = capacity
        self.inward = <char*>malloc(capacity)
        self.outward = <char*>malloc(capacity)
        if self.inward is NULL or self.outward is NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.inward)
        free(self.outward)

    cdef bint parse(self, size_t count, Session session):
        """Find the parts of the request of `count` bytes; False where its lengths don't fit each other.

        `unique` is 0 then where not even a header came, so that nobody can be answered.
        """
        cdef protocol.in_header* head = <protocol.in_header*>self.inward
        cdef size_t end, start
        self.unique = 0
        if count < sizeof(protocol.in_header):
            return False
        self.unique = head.unique
        self.nodeid = head.nodeid
        self.opcode = head.opcode
        if head.len != count:
            return False
        self.uid, self.gid, self.pid = head.uid, head.gid, head.pid
        start = sizeof(protocol.in_header) + op_size(head.opcode, session)
        # Extensions come last, counted in eight bytes.
        end = count - 8 * <size_t>head.total_extlen if 8 * <size_t>head.total_extlen < count else 0
        if head.opcode == protocol.INIT and end < start:
            # An older kernel's structure is shorter: what it lacks is nought.
            for index in range(end, start):
                self.inward[index] = 0
            end = start
        if end < start:
            return False
        self.op = self.inward + sizeof(protocol.in_header)
        self.data = self.inward + start
        self.size = end - start
        self.extensions = self.inward + end
        self.extensions_size = count - end
        self.out = self.outward + sizeof(protocol.out_header)
        self.room = self.capacity - sizeof(protocol.out_header)
        return True

    cdef size_t seal(self):
        """Head the answer; its bytes, 0 where none is expected, or it has been sent."""
        cdef protocol.out_header* head = <protocol.out_header*>self.outward
        cdef size_t size = sizeof(protocol.out_header) + (0 if self.error else self.length)
        if self.sent or not expects_answer(self.opcode):
            self.sent = False
            return 0
        head.len = <uint32_t>size
        head.error = -self.error
        head.unique = self.unique
        return size


cdef bint expects_answer(uint32_t opcode):
    return opcode not in (protocol.FORGET, protocol.BATCH_FORGET, protocol.INTERRUPT, protocol.NOTIFY_REPLY)


cdef class Channel:
    """One descriptor of the connection, and the loop that serves it."""

    cdef int fd
    cdef Session session
    # Whether its thread is one that only fetches requests where nobody else does.
    cdef bint helper
    # Whether its descriptor is one that is read without waiting (O_NONBLOCK).
    cdef bint looks
    # Buffers of requests that were answered later: to have new ones from the system takes long.
    cdef list spare

    def __init__(self, Session session, int fd, *, bint helper=False):
        self.session = session
        self.fd = fd
        self.helper = helper
        self.spare = []

    def greet(self):
        """Serve the first request, INIT, so that the session knows what the kernel can do."""
        self._serve(once=True)

    def serve(self):
        """Serve until the connection ends, in a thread for that; raises OSError for what is neither that nor passing."""
        own_umask(self.session)
        try:
            self._serve(once=False)
        finally:
            self.session.pace.leave()

    cdef _serve(self, bint once):
        cdef Buffers r = self._buffers()
        cdef Py_ssize_t count = 0
        cdef size_t answered = 0
        cdef size_t carried = 0
        cdef bint refused = False
        cdef int number = 0
        cdef Pace pace = self.session.pace
        cdef int64_t began = 0
        while True:
            # In one go, so that the interpreter is taken once a request; the others want it, too.
            with nogil:
                if began != 0:
                    pace.took(monotonic() - began, carried)
                refused = answered != 0 and write(self.fd, r.outward, answered) < 0
                if refused:
                    count, number, began = -1, c_errno, 0
                else:
                    pace.fetch(self.helper)
                    count = self._fetch(pace, r.inward, r.capacity)
                    number = c_errno
                    pace.fetched()
                    began = monotonic() if pace.alone and count > 0 else 0
            answered = 0
            if refused:
                self._report(r, number)
                continue
            if count < 0:
                if number in (errno.ENODEV, errno.ECONNABORTED):
                    # unmounted; the second where a request was just being handed over (fuse_dev_do_read)
                    return
                if number in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    # interrupted, or the request was taken back before it was read
                    continue
                raise OSError(number, os.strerror(number))
            if count == 0:
                # The other end of a socket is closed; /dev/fuse says ENODEV.
                return
            carried = count
            r.transport, r.fuse_fd = self, self.fd
            if not r.parse(count, self.session):
                self._refuse(r, count)
            elif not self.session.handle(r):
                # The answer comes later, out of these buffers.
                r = self._buffers()
            elif once:
                self._reply(r)
            else:
                carried += r.length
                answered = r.seal()
            if once:
                return

    cdef Py_ssize_t _fetch(self, Pace pace, char* inward, size_t capacity) noexcept nogil:
        """Wait for a request, and read it; -1 and errno where there is none to be had."""
        cdef Py_ssize_t count
        cdef int64_t until
        # Read once, as other threads change it.
        cdef bint alone = pace.alone
        if alone != self.looks and fcntl(self.fd, F_SETFL, O_NONBLOCK if alone else 0) == 0:
            self.looks = alone
        count = read(self.fd, inward, capacity)
        if not self.looks or count >= 0 or c_errno != EAGAIN:
            return count
        if pace.is_worth_looking():
            until = monotonic() + SOON
            while monotonic() < until:
                count = read(self.fd, inward, capacity)
                if count >= 0 or c_errno != EAGAIN:
                    pace.has_looked(True)
                    return count
            pace.has_looked(False)
        is_waiting(self.fd, -1)
        return read(self.fd, inward, capacity)

    cdef Buffers _buffers(self):
        return self.spare.pop() if self.spare else Buffers(self.session.payload + HEADROOM)

    cdef _refuse(self, Buffers r, Py_ssize_t count):
        log.error("a request of %d bytes that makes no sense", count)
        if r.unique != 0:
            r.error, r.length = errno.EIO, 0
            self._reply(r)

    def reply(self, Request request):
        """Answer a request that took longer, which is done with then; from any thread."""
        self._reply(request)
        if len(self.spare) < SPARE:
            self.spare.append(request)

    cdef _reply(self, Request request):
        cdef Buffers r = <Buffers>request
        cdef Py_ssize_t sent = 0
        cdef size_t size = r.seal()
        cdef int number
        if size == 0:
            return
        with nogil:
            sent = write(self.fd, r.outward, size)
            number = c_errno
        if sent < 0:
            self._report(r, number)

    cdef _report(self, Buffers r, int number):
        if number not in (errno.ENOENT, errno.ENODEV):
            # ENOENT: whoever asked was killed meanwhile; ENODEV: unmounted
            log.error("an answer to opcode %d was refused: %s", r.opcode, os.strerror(number))


def clone(int fd):
    """A further descriptor of the connection, with a queue of its own for answers (FUSE_DEV_IOC_CLONE)."""
    copy = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        ioctl(copy, _FUSE_DEV_IOC_CLONE, struct.pack("=I", fd))
    except OSError:
        os.close(copy)
        raise
    return copy
