# cython: language_level=3, annotation_typing=False
"""Requests about the data of files. They name the node: what the kernel opens, if it asks at all, only counts."""

import errno
import os

from libc.errno cimport EAGAIN, errno as c_errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.unistd cimport close, pread, pwrite

from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.pace cimport monotonic
from overlayfs_py.engines.native.passthrough cimport ATTRIBUTES_ALONE
from overlayfs_py.engines.native.pipes cimport RWF_NOWAIT, Pipe, iovec, is_cached, preadv2
from overlayfs_py.engines.native.plain cimport stat as stat_t
from overlayfs_py.engines.native.session cimport (
    DEFERRED, OPEN_TO_ALL, UNFINISHED, UNLOCKED, Request, Session, never_ask, serves
)

from overlayfs_py.core import files as core_files
from overlayfs_py.core import protection
from overlayfs_py.core.ops import OPERATIONS
from overlayfs_py.engines import machine
from overlayfs_py.engines.native.session import nothing

cdef uint32_t O_NOATIME = os.O_NOATIME

cdef extern from "<sys/stat.h>" nogil:
    int fstat(int fd, stat_t* st)

cdef enum:
    SET_IDS = 0o6000

    # Bytes of a write that is worth another thread, nanoseconds after which one has waited for its disk, and for how
    # long after it others are thought to.
    LARGE = 256 << 10
    LONG = 2_000_000
    WAITING = 1_000_000_000

# Linux 5.9 and 5.10 may find the end of a file where nothing is cached (preadv2(2), BUGS).
cdef bint tells_what_is_cached = machine.release() not in ((5, 9), (5, 10))


cdef Py_ssize_t do_read(Session s, Request r) except -2:
    cdef protocol.read_in* op = <protocol.read_in*>r.op
    cdef size_t size = min(<size_t>op.size, r.room)
    cdef int64_t offset = op.offset
    cdef Py_ssize_t count
    cdef stat_t st
    cdef Node node
    cdef int fd = -1
    cdef bint whole
    cdef bint asked = False
    if offset < 0:
        # preadv2(2) takes -1 for where the descriptor stands.
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    backing = None
    with s.lock:
        node = s.node(r.nodeid)
        if node.metacopy:
            # Its size is its own; the lower file may hold more, after a truncation that a crash has cut short.
            if not s.plain.stored(node, &st):
                raise OSError(c_errno, os.strerror(c_errno))
            size = <size_t>min(<int64_t>size, max(<int64_t>0, st.st_size - offset))
        if offset == 0 and not s.keeps_atimes:
            backing = s.fs.files.entries.get(node)
            if backing is None:
                fd = s.plain.open(node, &st)
                if fd >= 0:
                    asked = s.warm.visit(node)
        if fd < 0:
            backing = s.fs.files.held(node, write=False)
    if fd >= 0:
        return read_new(s, r, node, fd, size, st.st_size, asked)
    if op.flags & O_NOATIME and s.keeps_atimes:
        # The descriptor held is everybody's.
        backing = core_files.Backing(os.open(b"/proc/self/fd/%d" % backing.fd, os.O_RDONLY | O_NOATIME), write=False)
    fd = backing.fd
    if size >= s.pipes.least and send_pages(s, r, fd, size, offset, &count):
        return count
    with nogil:
        count = read_cached(fd, r.out, size, offset, &whole)
        if count < 0 and r.pinned and may_wait(fd, size, offset):
            count, whole = 0, False
        elif count < 0:
            count, whole = pread(fd, r.out, size, offset), True
    if count < 0:
        raise OSError(c_errno, os.strerror(c_errno))
    return count if whole else read_later(s, r, backing, size, offset, count)


cdef bint send_pages(Session s, Request r, int fd, size_t size, int64_t offset, Py_ssize_t* count) except -1:
    """Answer with what the page cache has of a file there, all at once and without copying it here, if that can be.

    `count` is how many bytes these are.
    """
    cdef stat_t st
    cdef size_t there = 0
    cdef bint sent = False
    cdef Pipe pipe = s.pipes.take()
    if pipe is None:
        return False
    with nogil:
        if fstat(fd, &st) == 0 and st.st_size > offset:
            there = <size_t>min(<int64_t>size, st.st_size - offset)
            if s.pipes.least <= there <= pipe.room and is_cached(fd, offset, there):
                sent = pipe.send(r.fuse_fd, r.unique, fd, offset, there)
    s.pipes.give(pipe)
    r.sent, count[0] = sent, there
    return sent


cdef Py_ssize_t read_new(Session s, Request r, Node node, int fd, size_t size, int64_t there, bint asked) except -2:
    """Read from the start of a file just opened, `there` bytes long, which the disk may have been `asked` for already.

    Most files end there, and are not kept open for more.
    """
    cdef size_t wanted = <size_t>min(<int64_t>size, there)
    cdef Py_ssize_t count
    cdef int64_t took = 0
    cdef int number = 0
    cdef bint whole = True
    cdef bint sent = wanted >= s.pipes.least and send_pages(s, r, fd, wanted, 0, &count)
    with nogil:
        if not sent:
            count = read_cached(fd, r.out, wanted, 0, &whole)
        if count < 0 and r.pinned and may_wait(fd, wanted, 0):
            count, whole = 0, False
        if count < 0:
            whole = True
            took = -monotonic()
            count = pread(fd, r.out, wanted, 0)
            number = c_errno
            took += monotonic()
        if count < 0 or (whole and count < <Py_ssize_t>size):
            close(fd)
    if count < 0:
        raise OSError(number, os.strerror(number))
    if not asked and (not whole or s.warm.is_long(took)):
        with s.lock:
            s.warm.waited(node)
    s.ask_disk()
    if whole and count < <Py_ssize_t>size:
        return count
    with s.lock:
        if there > <int64_t>size and s.plain.still(node):
            backing = s.fs.files.adopt(node, fd, write=False)
        else:
            backing = core_files.Backing(fd, write=False)
    return count if whole else read_later(s, r, backing, wanted, 0, count)


cdef Py_ssize_t read_cached(int fd, char* out, size_t size, int64_t offset, bint* whole) noexcept nogil:
    """As pread(2), but no more than the page cache has, which is all there is if `whole` is set.

    -1 where the filesystem can't tell what it has cached, or nothing can be read.
    """
    cdef iovec part
    cdef Py_ssize_t got
    cdef size_t count = 0
    if not tells_what_is_cached:
        return -1
    whole[0] = True
    while count < size:
        part.iov_base, part.iov_len = out + count, size - count
        got = preadv2(fd, &part, 1, offset + count, RWF_NOWAIT)
        if got == 0:
            break
        if got < 0:
            if c_errno != EAGAIN and count == 0:
                return -1
            whole[0] = False
            break
        count += got
    return count


cdef bint may_wait(int fd, size_t size, int64_t offset) noexcept nogil:
    """Whether not all of a part of a file is in the page cache, of a filesystem that can't be asked by reading.

    One that caches in another one, as the kernel's overlayfs, seems to have nothing cached.
    """
    cdef stat_t st
    if fstat(fd, &st) != 0 or st.st_size <= offset:
        return False
    return not is_cached(fd, offset, <size_t>min(<int64_t>size, st.st_size - offset))


cdef Py_ssize_t read_later(Session s, Request r, object backing, size_t size, int64_t offset, size_t count) except -2:
    """Read what has to come from the disk in another thread, so that who fetches requests doesn't wait for it.

    The first `count` bytes have been read.
    """
    taken = s.hand_over(r, _read_rest, (r, backing, size, offset, count))
    return DEFERRED if taken else _read_rest(r, backing, size, offset, count)


def _read_rest(Request r, backing, size_t size, int64_t offset, size_t count):
    cdef int fd = backing.fd
    cdef Py_ssize_t more
    with nogil:
        more = pread(fd, r.out + count, size - count, offset + count)
    if more < 0:
        raise OSError(c_errno, os.strerror(c_errno))
    return count + more


cdef Py_ssize_t do_write(Session s, Request r) except -2:
    cdef Node node
    cdef Py_ssize_t length
    backing = None
    with s.lock:
        node = s.node(r.nodeid)
        if node.upper is None and node.pinned < 0 or node.metacopy:
            length = s.run(r, _ready_to_write(s, node), write_later)
        else:
            backing = s.fs.files.held(node, write=True)
            clear_set_ids(s, r, backing)
    if backing is None:
        return length if length != UNFINISHED else r.do_rest()
    if r.pinned:
        return write_pinned(s, r, backing)
    return write_data(s, r, backing)


cdef Py_ssize_t write_pinned(Session s, Request r, object backing) except -2:
    """Write in the only thread of a processor, where that doesn't take long; else in another one.

    The disk can't be asked beforehand whether it has room: while one write had to wait, so may others.
    """
    if (<protocol.write_in*>r.op).size >= LARGE or monotonic() < s.writes_wait_until:
        if s.hand_over(r, _write, (s, r, backing)):
            return DEFERRED
    return _write(s, r, backing)


def _write(Session s, Request r, backing):
    cdef int64_t began = monotonic()
    cdef Py_ssize_t length = write_data(s, r, backing)
    cdef int64_t now = monotonic()
    if now - began > LONG:
        s.writes_wait_until = now + WAITING
    return length


def _ready_to_write(Session s, Node node):
    protection.check(s.fs, node, protection.IMMUTABLE)
    yield from core_files.copyup.copy_up(s.fs, node)
    return s.fs.files.held(node, write=True)


def write_later(Session session, Request request, value):
    clear_set_ids(session, request, value)
    request.rest = (_write_held, (session, request, value))
    return UNFINISHED


def _write_held(Session session, Request request, backing):
    return write_data(session, request, backing)


cdef clear_set_ids(Session s, Request r, object backing):
    if (<protocol.write_in*>r.op).write_flags & protocol.WRITE_KILL_SUIDGID:
        take_set_ids_of(s, r, r.nodeid, backing)


cdef take_set_ids_of(Session s, Request r, uint64_t node_id, object backing):
    """Take set-id bits from a file. The kernel would go by those that it knows, and run the program with them."""
    if core_files.take_set_ids(s.fs, backing.fd, r.in_group(s)):
        s.through.forget(node_id, ATTRIBUTES_ALONE)


cdef Py_ssize_t write_data(Session s, Request r, object backing) except -2:
    cdef protocol.write_in* op = <protocol.write_in*>r.op
    cdef protocol.write_out* out = <protocol.write_out*>r.out
    cdef int64_t offset = op.offset
    cdef size_t size = min(<size_t>op.size, r.size)
    cdef int fd = backing.fd
    cdef Py_ssize_t count
    if backing.append:
        core_files.check_growth(backing, offset)
    with nogil:
        count = pwrite(fd, r.data, size, offset)
    if count < 0:
        raise OSError(c_errno, os.strerror(c_errno))
    out.size, out.padding = <uint32_t>count, 0
    return sizeof(protocol.write_out)


cdef Py_ssize_t do_fsync(Session s, Request r) except -2:
    cdef bint data_only = (<protocol.fsync_in*>r.op).fsync_flags & protocol.FSYNC_FDATASYNC
    return s.run(r, OPERATIONS["fsync"](s.fs, s.node(r.nodeid), data_only=data_only), nothing)


cdef Py_ssize_t do_syncfs(Session s, Request r) except -2:
    return s.run(r, OPERATIONS["syncfs"](s.fs), nothing)


cdef Py_ssize_t do_fallocate(Session s, Request r) except -2:
    cdef protocol.fallocate_in* op = <protocol.fallocate_in*>r.op
    node = s.node(r.nodeid)

    def finish(session, request, value):
        take_set_ids(s, request, node)
        return 0

    return s.run(r, OPERATIONS["fallocate"](s.fs, node, op.mode, op.offset, op.length), finish)


cdef Py_ssize_t do_lseek(Session s, Request r) except -2:
    cdef protocol.lseek_in* op = <protocol.lseek_in*>r.op
    cdef Py_ssize_t length = 0
    if s.fs.config.writeback:
        # The kernel doesn't send what it has gathered before it asks, and a hole here may be data there.
        return never_ask()
    try:
        length = _seek(s, r)
    except OSError as error:
        if error.errno != errno.ENXIO or s.fs.upper is None:
            raise
        # No data any more: or none yet.
    if length and (s.fs.upper is None or not passes_hole(s, r)):
        return length
    # The kernel doesn't send first what was stored there through a mapping, either. In a thread that does nothing else, as
    # what it waits for takes the others.
    s.flushing.submit(s._answer, r, _flush_and_seek, (s, r))
    return DEFERRED


cdef bint passes_hole(Session s, Request r) except -1:
    """Whether the answer of do_lseek says that there is a hole somewhere."""
    cdef int64_t found = (<protocol.lseek_out*>r.out).offset
    cdef protocol.lseek_in* op = <protocol.lseek_in*>r.op
    if op.whence == os.SEEK_DATA:
        return found != <int64_t>op.offset
    with s.lock:
        return found < os.fstat(s.fs.files.held(s.node(r.nodeid), write=False).fd).st_size


def _seek(Session s, Request r):
    cdef protocol.lseek_in* op = <protocol.lseek_in*>r.op
    with s.lock:
        found = OPERATIONS["lseek"](s.fs, s.node(r.nodeid), <int64_t>op.offset, op.whence)
    (<protocol.lseek_out*>r.out).offset = found
    return sizeof(protocol.lseek_out)


def _flush_and_seek(Session s, Request r):
    s.through.forget(r.nodeid, (<protocol.lseek_in*>r.op).offset)
    return _seek(s, r)


cdef take_set_ids(Session s, Request r, Node node):
    """Take set-id bits from a file that somebody else than root has changed without a WRITE that would say so."""
    cdef stat_t st
    backing = s.fs.files.held(node, write=True)
    if fstat(backing.fd, &st) != 0:
        raise OSError(c_errno, os.strerror(c_errno))
    # Where modes are kept in xattrs it is not that of the file.
    if (st.st_mode & SET_IDS or s.fs.upper.override is not None) and r.asker() != 0:
        take_set_ids_of(s, r, node.id, backing)


serves(protocol.READ, do_read, sizeof(protocol.read_in), UNLOCKED | OPEN_TO_ALL)
serves(protocol.WRITE, do_write, sizeof(protocol.write_in), UNLOCKED | OPEN_TO_ALL)
serves(protocol.FSYNC, do_fsync, sizeof(protocol.fsync_in), OPEN_TO_ALL)
serves(protocol.SYNCFS, do_syncfs, 8, OPEN_TO_ALL)
serves(protocol.FALLOCATE, do_fallocate, sizeof(protocol.fallocate_in), 0)
serves(protocol.LSEEK, do_lseek, sizeof(protocol.lseek_in), UNLOCKED)
