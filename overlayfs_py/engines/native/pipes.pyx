# cython: language_level=3, annotation_typing=False
"""Answers with the data of files, which the kernel copies from the file's pages: they never come to the daemon.

A pipe takes the answer's header, and after it references to the pages; both go to /dev/fuse at once (splice(2)). That is
a copy less of what a reader waits for. Only what the page cache has is sent so, as anything else may take long.

Source: fuse_dev_splice_write in fs/fuse/dev.c, which takes no part of an answer; splice(2), pipe(7), cachestat(2).
"""

import fcntl
import os

from libc.errno cimport EBADF, ENODEV, ENOENT, EOPNOTSUPP, errno as c_errno
from libc.string cimport memset
from posix.unistd cimport read, write

from overlayfs_py.engines.native cimport protocol

cdef extern from *:
    """
    #include <sys/syscall.h>
    #include <unistd.h>

    struct cached { unsigned long long in_cache, dirty, written_back, evicted, recently_evicted; };

    static long cachestat_call(int fd, unsigned long long offset, unsigned long long size, struct cached *found) {
        unsigned long long range[2] = {offset, size};
        return syscall(451 /* cachestat, Linux 6.5 */, fd, range, found, 0);
    }
    """
    struct cached:
        uint64_t in_cache
    long cachestat_call(int fd, uint64_t offset, uint64_t size, cached* found) nogil

cdef extern from "<fcntl.h>" nogil:
    Py_ssize_t splice(int in_fd, int64_t* in_offset, int out_fd, int64_t* out_offset, size_t size, unsigned int flags)

cdef enum:
    # Pipes of one mount, however many threads it has, as two are hardly quicker, and bytes from which on to use one is quicker.
    PIPES = 1
    LEAST = 32 << 10

_PAGE = os.sysconf("SC_PAGE_SIZE")
cdef size_t PAGE = _PAGE
# Bytes of a pipe: as much as sixteen ordinary ones have, as all pipes of a user share fs.pipe-user-pages-soft.
_WANTED = 1 << 20

PIPE_DESCRIPTORS = 2 * PIPES
"""How many descriptors the pipes of a mount take."""


cdef class Pipes:
    """The pipes of one mount; with the interpreter held."""

    def __cinit__(self):
        self.free = []
        self.least = <size_t>-1

    def allow(self):
        """Have answers be sent through pipes, where the kernel tells what it has cached, and there is a pipe to be had."""
        cdef cached found
        if cachestat_call(-1, 0, 0, &found) == 0 or c_errno != EBADF:
            # ENOSYS before Linux 6.5; EPERM where a filter of system calls doesn't know it
            return
        self.to_make = PIPES
        self.least = LEAST

    cdef Pipe take(self):
        """One that is free, None where there is none."""
        cdef Pipe pipe
        if self.free:
            return self.free.pop()
        if self.to_make == 0:
            return None
        # First, as others may come here meanwhile.
        self.to_make -= 1
        try:
            pipe = Pipe()
            if pipe.room >= LEAST:
                return pipe
            # else: other pipes of this user leave no more (fs.pipe-user-pages-soft)
        except OSError:
            # no descriptors to be had
            pass
        self.to_make += 1
        return None

    cdef give(self, Pipe pipe):
        self.free.append(pipe)

    def close(self):
        """Close those that are free, which are all when nothing is served any more."""
        self.free.clear()


cdef class Pipe:
    """A pipe, empty between two answers."""

    def __cinit__(self):
        self.reading = self.writing = -1

    def __init__(self):
        self.reading, self.writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            size = fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, _WANTED)
        except PermissionError:
            # beyond fs.pipe-max-size, or what this user's pipes may take
            size = fcntl.fcntl(self.writing, fcntl.F_GETPIPE_SZ)
        # The header takes a page, and a part that doesn't begin with a page one more than its size.
        self.room = max(0, size - 2 * _PAGE)

    def __dealloc__(self):
        if self.reading >= 0:
            os.close(self.reading)
            os.close(self.writing)

    cdef bint send(self, int fuse_fd, uint64_t unique, int fd, int64_t offset, size_t size) noexcept nogil:
        """Answer request `unique` with so many bytes of a file, which are there; False where that must be done otherwise."""
        cdef Py_ssize_t sent
        if not self._fill(unique, fd, offset, size):
            self._drain()
            return False
        sent = splice(self.reading, NULL, fuse_fd, NULL, sizeof(protocol.out_header) + size, 0)
        if sent > 0:
            # all of it: the kernel takes no part of an answer
            return True
        self._drain()
        # The connection has ended: there is nothing to be answered.
        return sent < 0 and (c_errno == ENOENT or c_errno == ENODEV)

    cdef bint _fill(self, uint64_t unique, int fd, int64_t offset, size_t size) noexcept nogil:
        cdef protocol.out_header head
        cdef Py_ssize_t got
        cdef size_t count = 0
        memset(&head, 0, sizeof(head))
        head.len = <unsigned int>(sizeof(head) + size)
        head.unique = unique
        if write(self.writing, &head, sizeof(head)) != sizeof(head):
            return False
        while count < size:
            got = splice(fd, &offset, self.writing, NULL, size - count, 0)
            if got <= 0:
                # the file has become shorter, or its filesystem can't do this
                return False
            count += got
        return True

    cdef void _drain(self) noexcept nogil:
        cdef char thrown_away[4096]
        cdef int number = c_errno
        while read(self.reading, thrown_away, sizeof(thrown_away)) > 0:
            pass
        (&c_errno)[0] = number


cdef bint is_cached(int fd, int64_t offset, size_t size) noexcept nogil:
    """Whether a part of a file, which is there, can be read without waiting for its disk."""
    cdef cached found
    cdef iovec part
    cdef char last
    cdef uint64_t begin = offset // PAGE
    if cachestat_call(fd, offset, size, &found) < 0 or found.in_cache < (offset + size - 1) // PAGE - begin + 1:
        return False
    # What is just being read counts as cached; disks are read in order.
    part.iov_base, part.iov_len = &last, 1
    return preadv2(fd, &part, 1, offset + size - 1, RWF_NOWAIT) == 1 or c_errno == EOPNOTSUPP
