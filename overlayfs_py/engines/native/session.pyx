# cython: language_level=3, annotation_typing=False
"""One mount's requests, read from the protocol's structures, handed to core, and answered in them.

A transport fills a Request and calls handle(); where that is False the answer comes later, from another thread, through
the transport's reply(). All of core runs under one lock; data is read and written outside it.
"""

import errno
import logging
import os
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from libc.errno cimport ENODATA
from libc.errno cimport errno as c_errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.unistd cimport pread, pwrite

from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.plain cimport ABSENT, Plain
from overlayfs_py.engines.native.plain cimport stat as stat_t

from overlayfs_py.config import MS_NOATIME
from overlayfs_py.core import files as core_files
from overlayfs_py.core import readdir as core_readdir
from overlayfs_py.core.objects import attr as shown_attr
from overlayfs_py.core.ops import OPERATIONS
from overlayfs_py.core.requests import Caller, Changes
from overlayfs_py.engines.native.listing import Listing, Listings

cdef uint32_t O_NOATIME = os.O_NOATIME

cdef extern from "string.h" nogil:
    size_t strnlen(const char* text, size_t limit)

log = logging.getLogger(__name__)

cdef enum:
    DEFERRED = -1

MAX_WRITE = 1 << 20
"""The most bytes of one WRITE, what 256 pages hold."""

_LEAST_PAYLOAD = 128 << 10  # an extended attribute, whose name and value take a little over 64 KiB
_PAGE = os.sysconf("SC_PAGE_SIZE")

_LISTINGS = 64
_WORKERS = 8
_UNKNOWN_INO = 0xFFFFFFFF
_FOREVER = (1 << 64) - 1

UNSUPPORTED = frozenset()
"""Rows of core.ops.OPERATIONS that this engine can't serve."""

ctypedef Py_ssize_t (*Handler)(Session, Request) except -2

# Beyond what fits into an enumeration.
cdef uint64_t OVER_IO_URING = (<uint64_t>1) << 41

cdef Handler handlers[64]
# Whether the handler takes the lock itself, or needs none.
cdef bint unlocked[64]
# Whether it comes from someone who has the file open, or from the kernel itself: allow_root turns nobody away there.
cdef bint open_to_all[64]
# Size of the structure each operation has in front of its names and bytes.
cdef size_t op_sizes[64]


cdef class Request:
    """A request on its way to its answer. The transport owns the memory it points into."""

    cdef bytes name(self):
        """The next NUL-terminated name; EIO where there is none, which the kernel doesn't send."""
        cdef size_t length = strnlen(self.data, self.size)
        if length == self.size:
            raise OSError(errno.EIO, "a request without a name")
        name = self.data[:length]
        self.data += length + 1
        self.size -= length + 1
        return name

    cdef object caller(self, uint32_t umask):
        return Caller(self.uid, self.gid, self.pid, umask)


cdef size_t op_size(uint32_t opcode):
    return op_sizes[opcode] if opcode < 64 else 0


cdef class Session:
    """The state of one connection."""

    def __init__(self, fs, *, want_uring=False):
        self.fs = fs
        self.want_uring = want_uring
        self.keeps_atimes = not fs.config.mount_flags & MS_NOATIME
        self.uring = False
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="job")
        self.running = {}
        self.listings = Listings(_LISTINGS)
        self.plain = Plain(fs)
        # A page is what the kernel sends even where it is told to send less.
        self.max_write = max(_PAGE, min(fs.config.max_write or MAX_WRITE, MAX_WRITE) // _PAGE * _PAGE)
        self.payload = max(self.max_write, _LEAST_PAYLOAD)
        # The kernel knows no allow_root: the mount lets everybody in, and others are turned away here. The user who
        # mounts is root, too.
        self.only_root = fs.config.allow_root
        timeout = fs.config.timeout
        if timeout == float("inf"):
            self.timeout, self.timeout_nsec = _FOREVER, 0
        else:
            self.timeout, self.timeout_nsec = int(timeout), int(timeout % 1 * 1_000_000_000)

    cdef bint handle(self, Request r):
        """Serve a request; True when r.error and r.length are the answer, False when it comes later."""
        cdef Py_ssize_t length
        cdef Handler handler = handlers[r.opcode] if r.opcode < 64 else NULL
        if self.only_root and r.uid != 0 and not open_to_all[r.opcode & 63]:
            r.error, r.length = errno.EACCES, 0
            return True
        if handler is NULL:
            r.error, r.length = errno.ENOSYS, 0
            return True
        r.error = 0
        try:
            if unlocked[r.opcode]:
                length = handler(self, r)
            else:
                with self.lock:
                    length = handler(self, r)
            if length == DEFERRED:
                return False
            r.length = length
        except OSError as error:
            self.fail(r, error)
        except Exception:  # a request that goes wrong in an unknown way is answered, logged, survived
            log.exception("unexpected error in opcode %d on node %d: EIO answered", r.opcode, r.nodeid)
            r.error, r.length = errno.EIO, 0
        return True

    cdef fail(self, Request r, object error):
        number = error.errno or errno.EIO
        # The kernel takes ENOSYS for "never ask again": only what answers so by design says it.
        if number == errno.ENOSYS and not isinstance(error, _NeverAsk):
            number = errno.EOPNOTSUPP
        r.error, r.length = number, 0

    cdef Py_ssize_t run(self, Request r, object steps, object finish) except -2:
        """Run an operation under the lock, which is held; its jobs, if it hands out any, in another thread.

        `finish(session, request, value)` writes the answer and returns its length.
        """
        try:
            job = self.advance(steps)
        except StopIteration as stop:
            return finish(self, r, stop.value)
        self.pool.submit(self._continue, r, steps, job, self.owns(job), finish)
        return DEFERRED

    cdef object advance(self, object steps):
        job = next(steps)
        # One that has run, but is not committed yet, is to be waited for.
        while job.finished and job not in self.running:
            job = next(steps)
        return job

    cdef object owns(self, object job):
        """The event that says that `job` is committed, if it is for this caller to execute; None if it is another's."""
        if job in self.running:
            return None
        self.running[job] = threading.Event()
        return self.running[job]

    def _continue(self, Request r, steps, job, owned, finish):
        """Execute an operation's jobs one after the other, then answer; in a worker thread."""
        try:
            while job is not None:
                job, owned = self._step(r, steps, job, owned, finish)
        except OSError as error:
            self.fail(r, error)
        except Exception:
            log.exception("unexpected error in opcode %d on node %d: EIO answered", r.opcode, r.nodeid)
            r.error, r.length = errno.EIO, 0
        r.transport.reply(r)

    def _step(self, Request r, steps, job, owned, finish):
        event = owned
        if owned is None:
            # Whoever executes the job has to commit it before anyone else goes on.
            event = self.running.get(job)
            if event is not None:
                event.wait()
        else:
            job.execute()
        try:
            with self.lock:
                try:
                    following = self.advance(steps)
                    return following, self.owns(following)
                except StopIteration as stop:
                    r.error, r.length = 0, finish(self, r, stop.value)
                    return None, None
        finally:
            if owned is not None:
                del self.running[job]
                owned.set()

    cdef object node(self, uint64_t node_id):
        return self.fs.node(node_id)

    def close(self):
        """Wait for what is under way; the connection is gone."""
        self.pool.shutdown(wait=True)


class _NeverAsk(OSError):
    """The answer after which the kernel does without this request."""


cdef Py_ssize_t never_ask(Session s, Request r) except -2:
    r.error = errno.ENOSYS
    raise _NeverAsk(errno.ENOSYS, "")


# Structures.

cdef void put_attr(protocol.attr_t* out, object shown):
    cdef uint64_t rdev = shown.rdev
    out.ino = shown.ino
    out.size = shown.size
    out.blocks = shown.blocks
    put_time(shown.atime_ns, &out.atime, &out.atimensec)
    put_time(shown.mtime_ns, &out.mtime, &out.mtimensec)
    put_time(shown.ctime_ns, &out.ctime, &out.ctimensec)
    out.mode = shown.mode
    out.nlink = shown.nlink
    out.uid = shown.uid
    out.gid = shown.gid
    out.rdev = encode_device(rdev)
    out.blksize = shown.blksize
    out.flags = 0


cdef void put_stat(protocol.attr_t* out, Node node, stat_t* st):
    """As put_attr, of an object whose attributes are shown as they are stored."""
    out.ino = node.id
    out.size = st.st_size
    out.blocks = st.st_blocks
    out.atime, out.atimensec = <uint64_t>st.st_atim.tv_sec, <uint32_t>st.st_atim.tv_nsec
    out.mtime, out.mtimensec = <uint64_t>st.st_mtim.tv_sec, <uint32_t>st.st_mtim.tv_nsec
    out.ctime, out.ctimensec = <uint64_t>st.st_ctim.tv_sec, <uint32_t>st.st_ctim.tv_nsec
    out.mode = st.st_mode
    out.nlink = <uint32_t>st.st_nlink
    out.uid = st.st_uid
    out.gid = st.st_gid
    out.rdev = encode_device(st.st_rdev)
    out.blksize = <uint32_t>st.st_blksize
    out.flags = 0


cdef void put_time(object nanoseconds, uint64_t* seconds, uint32_t* rest):
    # Times before 1970 have negative seconds, in two's complement.
    cdef int64_t value = nanoseconds
    cdef int64_t whole = value // 1_000_000_000
    seconds[0] = <uint64_t>whole
    rest[0] = <uint32_t>(value - whole * 1_000_000_000)


cdef object get_time(uint64_t seconds, uint32_t rest):
    return (<int64_t>seconds) * 1_000_000_000 + rest


cdef uint32_t encode_device(uint64_t device):
    """A device number as the protocol has it: the kernel's new_encode_dev."""
    cdef uint64_t major = ((device >> 8) & 0xFFF) | ((device >> 32) & 0xFFFFF000)
    cdef uint64_t minor = (device & 0xFF) | ((device >> 12) & 0xFFFFFF00)
    return <uint32_t>((minor & 0xFF) | (major << 8) | ((minor & ~<uint64_t>0xFF) << 12))


cdef object decode_device(uint32_t device):
    return os.makedev((device & 0xFFF00) >> 8, (device & 0xFF) | ((device >> 12) & 0xFFF00))


cdef Py_ssize_t put_entry_at(Session s, protocol.entry_out* out, Node node, object st) except -2:
    """An entry with a node's attributes: those core has read, else read here."""
    cdef stat_t own
    if st is None and s.plain.attributes(node, &own):
        return put_plain_entry(s, out, node, &own)
    memset(out, 0, sizeof(protocol.entry_out))
    put_attr(&out.attr, shown_attr(s.fs, node, st))
    return put_reference(s, out, node)


cdef Py_ssize_t put_plain_entry(Session s, protocol.entry_out* out, Node node, stat_t* st) except -2:
    memset(out, 0, sizeof(protocol.entry_out))
    put_stat(&out.attr, node, st)
    return put_reference(s, out, node)


cdef Py_ssize_t put_reference(Session s, protocol.entry_out* out, Node node) except -2:
    out.nodeid = node.id
    out.entry_valid = out.attr_valid = s.timeout
    out.entry_valid_nsec = out.attr_valid_nsec = s.timeout_nsec
    return sizeof(protocol.entry_out)


cdef Py_ssize_t put_entry(Session s, Request r, Node node) except -2:
    """The answer that gives the kernel a reference to `node`."""
    put_entry_at(s, <protocol.entry_out*>r.out, node, None)
    node.lookups += 1
    return sizeof(protocol.entry_out)


cdef Py_ssize_t put_attr_out(Session s, Request r, object shown) except -2:
    cdef protocol.attr_out* out = <protocol.attr_out*>r.out
    out.attr_valid = s.timeout
    out.attr_valid_nsec = s.timeout_nsec
    out.dummy = 0
    put_attr(&out.attr, shown)
    return sizeof(protocol.attr_out)


def _nothing(session, request, value):
    return 0


def _entry(Session session, Request request, value):
    return put_entry(session, request, value)


def _attributes(Session session, Request request, value):
    return put_attr_out(session, request, value)


# Names.

cdef Py_ssize_t do_lookup(Session s, Request r) except -2:
    cdef protocol.entry_out* out = <protocol.entry_out*>r.out
    cdef stat_t own
    cdef Node parent = s.node(r.nodeid)
    name = r.name()
    node = s.plain.entry(parent, name, &own)
    if node is ABSENT:
        return put_absent(s, out)
    if node is not None:
        put_plain_entry(s, out, node, &own)
    else:
        try:
            node, st = OPERATIONS["lookup"](s.fs, parent, name)
        except FileNotFoundError:
            return put_absent(s, out)
        put_entry_at(s, out, node, st)
    (<Node>node).lookups += 1
    return sizeof(protocol.entry_out)


cdef Py_ssize_t put_absent(Session s, protocol.entry_out* out) except -2:
    """That there is no such name, which the kernel remembers."""
    memset(out, 0, sizeof(protocol.entry_out))
    out.entry_valid, out.entry_valid_nsec = s.timeout, s.timeout_nsec
    return sizeof(protocol.entry_out)


cdef forget_one(Session s, uint64_t node_id, uint64_t count):
    node = s.fs.nodes.by_id.get(node_id)
    if node is not None:
        OPERATIONS["forget"](s.fs, node, count)
        if node_id not in s.fs.nodes.by_id:
            s.listings.drop(node_id)


cdef Py_ssize_t do_forget(Session s, Request r) except -2:
    forget_one(s, r.nodeid, (<uint64_t*>r.op)[0])
    return 0


cdef Py_ssize_t do_batch_forget(Session s, Request r) except -2:
    cdef protocol.batch_forget_in* head = <protocol.batch_forget_in*>r.op
    cdef protocol.forget_one* one = <protocol.forget_one*>r.data
    cdef size_t index
    for index in range(min(<size_t>head.count, r.size // sizeof(protocol.forget_one))):
        forget_one(s, one[index].nodeid, one[index].nlookup)
    return 0


cdef Py_ssize_t do_mknod(Session s, Request r) except -2:
    cdef protocol.mknod_in* op = <protocol.mknod_in*>r.op
    name = r.name()
    rdev = decode_device(op.rdev)
    node = OPERATIONS["mknod"](s.fs, r.caller(op.umask), s.node(r.nodeid), name, op.mode, rdev)
    s.listings.added(r.nodeid, name)
    return put_entry(s, r, node)


cdef Py_ssize_t do_mkdir(Session s, Request r) except -2:
    cdef protocol.mkdir_in* op = <protocol.mkdir_in*>r.op
    name = r.name()
    node = OPERATIONS["mkdir"](s.fs, r.caller(op.umask), s.node(r.nodeid), name, op.mode)
    s.listings.added(r.nodeid, name)
    return put_entry(s, r, node)


cdef Py_ssize_t do_symlink(Session s, Request r) except -2:
    name = r.name()
    target = r.name()
    node = OPERATIONS["symlink"](s.fs, r.caller(0), s.node(r.nodeid), name, target)
    s.listings.added(r.nodeid, name)
    return put_entry(s, r, node)


cdef Py_ssize_t do_link(Session s, Request r) except -2:
    cdef uint64_t parent_id = r.nodeid
    name = r.name()
    node = s.node((<protocol.link_in*>r.op).oldnodeid)

    def finish(session, request, value):
        s.listings.added(parent_id, name)
        return put_entry(s, request, value)

    return s.run(r, OPERATIONS["link"](s.fs, node, s.node(parent_id), name), finish)


cdef Py_ssize_t do_tmpfile(Session s, Request r) except -2:
    cdef protocol.create_in* op = <protocol.create_in*>r.op
    cdef protocol.open_out* opened
    node = OPERATIONS["tmpfile"](s.fs, r.caller(op.umask), s.node(r.nodeid), op.mode)
    opened = <protocol.open_out*>(r.out + put_entry(s, r, node))
    memset(opened, 0, sizeof(protocol.open_out))
    return sizeof(protocol.entry_out) + sizeof(protocol.open_out)


cdef Py_ssize_t remove(Session s, Request r, str row) except -2:
    cdef uint64_t parent_id = r.nodeid
    name = r.name()

    def finish(session, request, value):
        s.listings.removed(parent_id, name)
        return 0

    return s.run(r, OPERATIONS[row](s.fs, s.node(parent_id), name), finish)


cdef Py_ssize_t do_unlink(Session s, Request r) except -2:
    return remove(s, r, "unlink")


cdef Py_ssize_t do_rmdir(Session s, Request r) except -2:
    return remove(s, r, "rmdir")


cdef Py_ssize_t rename(Session s, Request r, uint64_t new_id, uint32_t flags) except -2:
    cdef uint64_t old_id = r.nodeid
    old_name = r.name()
    new_name = r.name()

    def finish(session, request, value):
        if not flags & 2:  # RENAME_EXCHANGE
            s.listings.removed(old_id, old_name)
            s.listings.drop(new_id)
        return 0

    steps = OPERATIONS["rename"](s.fs, s.node(old_id), old_name, s.node(new_id), new_name, flags)
    return s.run(r, steps, finish)


cdef Py_ssize_t do_rename(Session s, Request r) except -2:
    return rename(s, r, (<protocol.rename_in*>r.op).newdir, 0)


cdef Py_ssize_t do_rename2(Session s, Request r) except -2:
    cdef protocol.rename2_in* op = <protocol.rename2_in*>r.op
    return rename(s, r, op.newdir, op.flags)


# Attributes.

cdef Py_ssize_t do_getattr(Session s, Request r) except -2:
    cdef protocol.attr_out* out = <protocol.attr_out*>r.out
    cdef Node node = s.node(r.nodeid)
    cdef stat_t own
    if not s.plain.attributes(node, &own):
        return put_attr_out(s, r, OPERATIONS["getattr"](s.fs, node))
    out.attr_valid, out.attr_valid_nsec, out.dummy = s.timeout, s.timeout_nsec, 0
    put_stat(&out.attr, node, &own)
    return sizeof(protocol.attr_out)


cdef Py_ssize_t do_setattr(Session s, Request r) except -2:
    cdef protocol.setattr_in* op = <protocol.setattr_in*>r.op
    cdef uint32_t valid = op.valid
    now = None
    if valid & (protocol.FATTR_ATIME_NOW | protocol.FATTR_MTIME_NOW):
        now = time.time_ns()
    changes = Changes(
        stat.S_IMODE(op.mode) if valid & protocol.FATTR_MODE else None,
        op.uid if valid & protocol.FATTR_UID else None,
        op.gid if valid & protocol.FATTR_GID else None,
        op.size if valid & protocol.FATTR_SIZE else None,
        None if not valid & protocol.FATTR_ATIME
        else now if valid & protocol.FATTR_ATIME_NOW else get_time(op.atime, op.atimensec),
        None if not valid & protocol.FATTR_MTIME
        else now if valid & protocol.FATTR_MTIME_NOW else get_time(op.mtime, op.mtimensec),
        # A change of nothing is chown(-1, -1), which takes them too.
        clear_set_ids=valid == 0 or bool(valid & protocol.FATTR_KILL_SUIDGID),
    )
    return s.run(r, OPERATIONS["setattr"](s.fs, s.node(r.nodeid), changes), _attributes)


cdef Py_ssize_t do_readlink(Session s, Request r) except -2:
    return put_bytes(r, OPERATIONS["readlink"](s.fs, s.node(r.nodeid)))


cdef Py_ssize_t put_bytes(Request r, bytes value) except -2:
    if <size_t>len(value) > r.room:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    memcpy(r.out, <char*>value, len(value))
    return len(value)


cdef Py_ssize_t do_statfs(Session s, Request r) except -2:
    cdef protocol.kstatfs* out = <protocol.kstatfs*>r.out
    found = OPERATIONS["statfs"](s.fs)
    memset(out, 0, sizeof(protocol.kstatfs))
    out.blocks = found.f_blocks
    out.bfree = found.f_bfree
    out.bavail = found.f_bavail
    out.files = found.f_files
    out.ffree = found.f_ffree
    out.bsize = found.f_bsize
    out.namelen = found.f_namemax
    out.frsize = found.f_frsize
    return sizeof(protocol.kstatfs)


cdef need_xattrs(Session s):
    if s.fs.config.noxattrs:
        raise _NeverAsk(errno.ENOSYS, "")


cdef Py_ssize_t put_sized(Request r, uint32_t wanted, bytes value) except -2:
    """A value, or only its size where the caller asks for that with a size of 0; ERANGE where it has too little room."""
    if wanted == 0:
        return put_size(r, len(value))
    if len(value) > wanted:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    return put_bytes(r, value)


cdef Py_ssize_t put_size(Request r, size_t size) except -2:
    cdef protocol.getxattr_out* out = <protocol.getxattr_out*>r.out
    out.size, out.padding = <uint32_t>size, 0
    return sizeof(protocol.getxattr_out)


cdef Py_ssize_t do_getxattr(Session s, Request r) except -2:
    need_xattrs(s)
    cdef uint32_t wanted = (<protocol.getxattr_in*>r.op).size
    cdef Node node = s.node(r.nodeid)
    cdef Py_ssize_t length
    key = r.name()
    # The kernel asks for security.capability before the first write to any file.
    length = s.plain.xattr(node, key, r.out, min(<size_t>wanted, r.room))
    if length >= 0:
        return length if wanted else put_size(r, length)
    if length == -ENODATA:
        r.error = errno.ENODATA
        return 0
    return put_sized(r, wanted, OPERATIONS["getxattr"](s.fs, node, key))


cdef Py_ssize_t do_listxattr(Session s, Request r) except -2:
    need_xattrs(s)
    cdef uint32_t wanted = (<protocol.getxattr_in*>r.op).size
    keys = OPERATIONS["listxattr"](s.fs, s.node(r.nodeid), trusted=r.uid == 0)
    return put_sized(r, wanted, b"".join([key + b"\0" for key in keys]))


cdef Py_ssize_t do_setxattr(Session s, Request r) except -2:
    need_xattrs(s)
    cdef protocol.setxattr_in* op = <protocol.setxattr_in*>r.op
    key = r.name()
    if op.size > r.size:
        raise OSError(errno.EIO, "a value cut short")
    value = r.data[: op.size]
    clear_sgid = bool(op.setxattr_flags & protocol.SETXATTR_ACL_KILL_SGID)
    steps = OPERATIONS["setxattr"](s.fs, s.node(r.nodeid), key, value, op.flags, clear_sgid=clear_sgid)
    return s.run(r, steps, _nothing)


cdef Py_ssize_t do_removexattr(Session s, Request r) except -2:
    need_xattrs(s)
    return s.run(r, OPERATIONS["removexattr"](s.fs, s.node(r.nodeid), r.name()), _nothing)


# Files. None of them is opened: requests name the node.

cdef Py_ssize_t do_read(Session s, Request r) except -2:
    cdef protocol.read_in* op = <protocol.read_in*>r.op
    cdef size_t size = min(<size_t>op.size, r.room)
    cdef int64_t offset = op.offset
    cdef Py_ssize_t count
    cdef int fd
    with s.lock:
        backing = s.fs.files.held(s.node(r.nodeid), write=False)
    if op.flags & O_NOATIME and s.keeps_atimes:
        # The descriptor held is everybody's.
        backing = core_files.Backing(os.open(b"/proc/self/fd/%d" % backing.fd, os.O_RDONLY | O_NOATIME), write=False)
    fd = backing.fd
    with nogil:
        count = pread(fd, r.out, size, offset)
    if count < 0:
        raise OSError(c_errno, os.strerror(c_errno))
    return count


cdef Py_ssize_t do_write(Session s, Request r) except -2:
    cdef Node node
    with s.lock:
        node = s.node(r.nodeid)
        if node.upper is None and node.pinned < 0 or node.metacopy:
            return s.run(r, _ready_to_write(s, node), write_held)
        backing = s.fs.files.held(node, write=True)
        clear_set_ids(s, r, backing)
    return write_data(s, r, backing)


def _ready_to_write(Session s, Node node):
    yield from core_files.copyup.copy_up(s.fs, node)
    return s.fs.files.held(node, write=True)


def write_held(Session session, Request request, value):
    clear_set_ids(session, request, value)
    return write_data(session, request, value)


cdef clear_set_ids(Session s, Request r, object backing):
    if (<protocol.write_in*>r.op).write_flags & protocol.WRITE_KILL_SUIDGID:
        core_files.take_set_ids(backing.fd)


cdef Py_ssize_t write_data(Session s, Request r, object backing) except -2:
    cdef protocol.write_in* op = <protocol.write_in*>r.op
    cdef protocol.write_out* out = <protocol.write_out*>r.out
    cdef int64_t offset = op.offset
    cdef size_t size = min(<size_t>op.size, r.size)
    cdef int fd = backing.fd
    cdef Py_ssize_t count
    with nogil:
        count = pwrite(fd, r.data, size, offset)
    if count < 0:
        raise OSError(c_errno, os.strerror(c_errno))
    out.size, out.padding = <uint32_t>count, 0
    return sizeof(protocol.write_out)


cdef Py_ssize_t do_fsync(Session s, Request r) except -2:
    cdef bint data_only = (<protocol.fsync_in*>r.op).fsync_flags & protocol.FSYNC_FDATASYNC
    return s.run(r, OPERATIONS["fsync"](s.fs, s.node(r.nodeid), data_only=data_only), _nothing)


cdef Py_ssize_t do_fsyncdir(Session s, Request r) except -2:
    cdef bint data_only = (<protocol.fsync_in*>r.op).fsync_flags & protocol.FSYNC_FDATASYNC
    return s.run(r, OPERATIONS["fsyncdir"](s.fs, s.node(r.nodeid), data_only=data_only), _nothing)


cdef Py_ssize_t do_syncfs(Session s, Request r) except -2:
    return s.run(r, OPERATIONS["syncfs"](s.fs), _nothing)


cdef Py_ssize_t do_fallocate(Session s, Request r) except -2:
    cdef protocol.fallocate_in* op = <protocol.fallocate_in*>r.op
    return s.run(r, OPERATIONS["fallocate"](s.fs, s.node(r.nodeid), op.mode, op.offset, op.length), _nothing)


cdef Py_ssize_t do_lseek(Session s, Request r) except -2:
    cdef protocol.lseek_in* op = <protocol.lseek_in*>r.op
    found = OPERATIONS["lseek"](s.fs, s.node(r.nodeid), <int64_t>op.offset, op.whence)
    (<protocol.lseek_out*>r.out).offset = found
    return sizeof(protocol.lseek_out)


cdef object copy_steps(Session s, Request r):
    cdef protocol.copy_file_range_in* op = <protocol.copy_file_range_in*>r.op
    source, target = s.node(r.nodeid), s.node(op.nodeid_out)
    return OPERATIONS["copy_file_range"](s.fs, source, <int64_t>op.off_in, target, <int64_t>op.off_out, op.len)


cdef Py_ssize_t do_copy_file_range(Session s, Request r) except -2:
    (<protocol.copy_file_range_in*>r.op).len = min((<protocol.copy_file_range_in*>r.op).len, <uint64_t>0x7FFFF000)
    return s.run(r, copy_steps(s, r), _copied)


def _copied(session, Request request, value):
    cdef protocol.write_out* out = <protocol.write_out*>request.out
    out.size, out.padding = value, 0
    return sizeof(protocol.write_out)


cdef Py_ssize_t do_copy_file_range_64(Session s, Request r) except -2:
    return s.run(r, copy_steps(s, r), _copied_64)


def _copied_64(session, Request request, value):
    (<protocol.copy_file_range_out*>request.out).bytes_copied = value
    return sizeof(protocol.copy_file_range_out)


cdef Py_ssize_t do_release(Session s, Request r) except -2:
    # Of files made by O_TMPFILE, which the kernel takes for opened.
    return 0


cdef Py_ssize_t do_ioctl(Session s, Request r) except -2:
    # Never ENOSYS: the kernel's overlayfs must be able to use this mount as a lower layer.
    raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))


# Directories.

cdef Py_ssize_t do_opendir(Session s, Request r) except -2:
    # The kernel keeps the listing of a directory that it need not open, and looks at its mtime alone, which is the
    # upper part's.
    if s.timeout == _FOREVER:
        return never_ask(s, r)
    memset(r.out, 0, sizeof(protocol.open_out))
    return sizeof(protocol.open_out)


cdef object listing_of(Session s, Request r, Node node, uint64_t offset):
    listing = s.listings.get(r.nodeid)
    if listing is None or offset == 0:
        names = s.plain.names(node)
        listing = Listing(core_readdir.names(s.fs, node) if names is None else names)
        s.listings.put(r.nodeid, listing)
    return listing


cdef Py_ssize_t do_readdir(Session s, Request r) except -2:
    return list_entries(s, r, False)


cdef Py_ssize_t do_readdirplus(Session s, Request r) except -2:
    return list_entries(s, r, True)


cdef Py_ssize_t list_entries(Session s, Request r, bint plus) except -2:
    cdef protocol.read_in* op = <protocol.read_in*>r.op
    cdef uint64_t offset = op.offset
    cdef size_t room = min(<size_t>op.size, r.room)
    cdef size_t used = 0
    cdef size_t added
    cdef Node node = s.node(r.nodeid)
    cdef Node child
    cdef stat_t own
    if offset < 1:
        used += put_dirent(s, r.out, room, node, None, b".", 1, plus, False)
    if offset < 2:
        used += put_dirent(s, r.out + used, room - used, node.parent or node, None, b"..", 2, plus, False)
    listing = listing_of(s, r, node, offset)
    for index in range(listing.after(offset), len(listing.entries)):
        position, name = listing.entries[index]
        if name in listing.removed:
            continue
        try:
            found = s.plain.entry(node, name, &own)
            if found is ABSENT:
                continue
            if found is not None:
                child, st = <Node>found, None
            else:
                child, st = OPERATIONS["lookup"](s.fs, node, name)
        except FileNotFoundError:
            # gone since the listing was taken
            continue
        except OSError:
            # This name alone is broken: it is listed, and whoever uses it gets the error.
            kind = core_readdir.kind_of(s.fs, node, name)
            added = put_name(r.out + used, room - used, name, position, plus, _UNKNOWN_INO, kind >> 12)
            if added == 0:
                break
            used += added
            continue
        if found is not None and plus:
            added = put_name(r.out + used, room - used, name, position, True, child.id, child.kind >> 12)
            if added:
                put_plain_entry(s, <protocol.entry_out*>(r.out + used), child, &own)
                child.lookups += 1
        else:
            added = put_dirent(s, r.out + used, room - used, child, st, name, position, plus, plus)
        if added == 0 or not plus:
            # What the kernel gets no reference to doesn't stay for its sake.
            OPERATIONS["forget"](s.fs, child, 0)
        if added == 0:
            break
        used += added
    return used


cdef Py_ssize_t put_dirent(
    Session s, char* out, size_t room, Node node, object st, bytes name, uint64_t position, bint plus, bint counted
) except -2:
    """One entry, with its attributes where `plus` is set; 0 where there is no room for it."""
    cdef Py_ssize_t size = put_name(out, room, name, position, plus, node.id, node.kind >> 12)
    if size and counted:
        put_entry_at(s, <protocol.entry_out*>out, node, st)
        # The kernel counts only the entries it received, so this comes after the fit.
        node.lookups += 1
    return size


cdef Py_ssize_t put_name(
    char* out, size_t room, bytes name, uint64_t position, bint plus, uint64_t ino, uint32_t kind
) except -2:
    """One entry, whose attributes, with `plus`, say that the kernel gets no reference."""
    cdef size_t head = sizeof(protocol.entry_out) if plus else 0
    cdef size_t size = (head + sizeof(protocol.dirent) + len(name) + 7) & ~<size_t>7
    cdef protocol.dirent* entry
    if size > room:
        return 0
    memset(out + size - 8, 0, 8)
    memset(out, 0, head)
    entry = <protocol.dirent*>(out + head)
    entry.ino = ino
    entry.off = position
    entry.namelen = len(name)
    entry.type = kind
    memcpy(out + head + sizeof(protocol.dirent), <char*>name, len(name))
    return size


# The connection.

cdef Py_ssize_t do_init(Session s, Request r) except -2:
    cdef protocol.init_in* op = <protocol.init_in*>r.op
    cdef protocol.init_out* out = <protocol.init_out*>r.out
    cdef uint64_t offered = op.flags
    # Without READDIRPLUS_AUTO: under it the kernel asks for the bare names of every other piece of a big directory, and
    # then for each of them, which costs a walk a quarter more than the attributes cost a listing that needs none.
    cdef uint64_t wanted = (
        protocol.ASYNC_READ
        | protocol.BIG_WRITES
        | protocol.DONT_MASK
        | protocol.HAS_IOCTL_DIR
        | protocol.DO_READDIRPLUS
        | protocol.ASYNC_DIO
        | protocol.NO_OPEN_SUPPORT
        | protocol.NO_OPENDIR_SUPPORT
        | protocol.PARALLEL_DIROPS
        | protocol.MAX_PAGES
        | protocol.CACHE_SYMLINKS
        | protocol.HANDLE_KILLPRIV_V2
        | protocol.SETXATTR_EXT
        | protocol.INIT_EXT
    )
    if op.major != protocol.KERNEL_VERSION or op.minor < protocol.OLDEST_MINOR_VERSION:
        raise OSError(errno.EPROTO, "a kernel too old")
    if op.flags & protocol.INIT_EXT:
        offered |= (<uint64_t>op.flags2) << 32
    if not s.fs.config.noacl and not s.fs.config.noxattrs:
        wanted |= protocol.POSIX_ACL
    if s.want_uring:
        wanted |= OVER_IO_URING
    # What the kernel has cached of a file stays true, unless it is to look whether layers change.
    wanted |= protocol.EXPLICIT_INVAL_DATA if s.timeout == _FOREVER else protocol.AUTO_INVAL_DATA
    if s.fs.config.writeback:
        wanted |= protocol.WRITEBACK_CACHE
    wanted &= offered
    memset(out, 0, sizeof(protocol.init_out))
    out.major = protocol.KERNEL_VERSION
    out.minor = min(op.minor, <uint32_t>protocol.KERNEL_MINOR_VERSION)
    out.max_readahead = op.max_readahead
    out.flags = <uint32_t>wanted
    out.flags2 = <uint32_t>(wanted >> 32)
    out.max_background = 64
    out.congestion_threshold = 48
    out.max_write = s.max_write
    out.max_pages = s.payload // _PAGE
    out.time_gran = 1
    s.minor = out.minor
    s.uring = bool(wanted & OVER_IO_URING)
    return sizeof(protocol.init_out)


cdef set_up():
    """Fill the tables: what serves each opcode, whether under the lock, and behind which structure its names are."""
    cdef int opcode
    for opcode in range(64):
        handlers[opcode] = NULL
        unlocked[opcode] = False
        open_to_all[opcode] = False
        op_sizes[opcode] = 0
    handlers[protocol.LOOKUP] = do_lookup
    handlers[protocol.FORGET] = do_forget
    handlers[protocol.BATCH_FORGET] = do_batch_forget
    handlers[protocol.GETATTR] = do_getattr
    handlers[protocol.SETATTR] = do_setattr
    handlers[protocol.READLINK] = do_readlink
    handlers[protocol.SYMLINK] = do_symlink
    handlers[protocol.MKNOD] = do_mknod
    handlers[protocol.MKDIR] = do_mkdir
    handlers[protocol.UNLINK] = do_unlink
    handlers[protocol.RMDIR] = do_rmdir
    handlers[protocol.RENAME] = do_rename
    handlers[protocol.RENAME2] = do_rename2
    handlers[protocol.LINK] = do_link
    handlers[protocol.TMPFILE] = do_tmpfile
    handlers[protocol.READ] = do_read
    handlers[protocol.WRITE] = do_write
    handlers[protocol.STATFS] = do_statfs
    handlers[protocol.FSYNC] = do_fsync
    handlers[protocol.FSYNCDIR] = do_fsyncdir
    handlers[protocol.SYNCFS] = do_syncfs
    handlers[protocol.SETXATTR] = do_setxattr
    handlers[protocol.GETXATTR] = do_getxattr
    handlers[protocol.LISTXATTR] = do_listxattr
    handlers[protocol.REMOVEXATTR] = do_removexattr
    handlers[protocol.OPENDIR] = do_opendir
    handlers[protocol.READDIR] = do_readdir
    handlers[protocol.READDIRPLUS] = do_readdirplus
    handlers[protocol.FALLOCATE] = do_fallocate
    handlers[protocol.LSEEK] = do_lseek
    handlers[protocol.COPY_FILE_RANGE] = do_copy_file_range
    handlers[protocol.COPY_FILE_RANGE_64] = do_copy_file_range_64
    handlers[protocol.RELEASE] = do_release
    handlers[protocol.RELEASEDIR] = do_release
    handlers[protocol.IOCTL] = do_ioctl
    handlers[protocol.INIT] = do_init
    handlers[protocol.DESTROY] = do_release
    for opcode in (protocol.READ, protocol.WRITE, protocol.IOCTL, protocol.RELEASE, protocol.RELEASEDIR):
        unlocked[opcode] = True
    for opcode in (
        protocol.INIT,
        protocol.READ,
        protocol.WRITE,
        protocol.FSYNC,
        protocol.READDIR,
        protocol.READDIRPLUS,
        protocol.FSYNCDIR,
        protocol.RELEASE,
        protocol.RELEASEDIR,
        protocol.FORGET,
        protocol.BATCH_FORGET,
        protocol.SYNCFS,
        protocol.DESTROY,
    ):
        open_to_all[opcode] = True
    op_sizes[protocol.FORGET] = 8
    op_sizes[protocol.GETATTR] = 16
    op_sizes[protocol.SETATTR] = sizeof(protocol.setattr_in)
    op_sizes[protocol.MKNOD] = sizeof(protocol.mknod_in)
    op_sizes[protocol.MKDIR] = sizeof(protocol.mkdir_in)
    op_sizes[protocol.RENAME] = sizeof(protocol.rename_in)
    op_sizes[protocol.RENAME2] = sizeof(protocol.rename2_in)
    op_sizes[protocol.LINK] = sizeof(protocol.link_in)
    op_sizes[protocol.TMPFILE] = sizeof(protocol.create_in)
    op_sizes[protocol.READ] = sizeof(protocol.read_in)
    op_sizes[protocol.OPENDIR] = 8
    op_sizes[protocol.READDIR] = sizeof(protocol.read_in)
    op_sizes[protocol.READDIRPLUS] = sizeof(protocol.read_in)
    op_sizes[protocol.WRITE] = sizeof(protocol.write_in)
    op_sizes[protocol.FSYNC] = sizeof(protocol.fsync_in)
    op_sizes[protocol.FSYNCDIR] = sizeof(protocol.fsync_in)
    op_sizes[protocol.SYNCFS] = 8
    op_sizes[protocol.SETXATTR] = sizeof(protocol.setxattr_in)
    op_sizes[protocol.GETXATTR] = sizeof(protocol.getxattr_in)
    op_sizes[protocol.LISTXATTR] = sizeof(protocol.getxattr_in)
    op_sizes[protocol.BATCH_FORGET] = sizeof(protocol.batch_forget_in)
    op_sizes[protocol.FALLOCATE] = sizeof(protocol.fallocate_in)
    op_sizes[protocol.LSEEK] = sizeof(protocol.lseek_in)
    op_sizes[protocol.COPY_FILE_RANGE] = sizeof(protocol.copy_file_range_in)
    op_sizes[protocol.COPY_FILE_RANGE_64] = sizeof(protocol.copy_file_range_in)
    op_sizes[protocol.IOCTL] = sizeof(protocol.ioctl_in)
    op_sizes[protocol.INIT] = sizeof(protocol.init_in)


set_up()
