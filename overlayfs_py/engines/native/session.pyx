# cython: language_level=3, annotation_typing=False
"""One mount's requests: read from the protocol's structures, handed to what serves them, and answered.

A transport fills a Request and calls handle(); where that is False the answer comes later, from another thread, through
the transport's reply(). All of core runs under one lock; data is read and written outside it.

What serves an opcode stands in a table that the modules of the handlers fill when they are loaded: names, attributes,
opening, files, copying, directories, connection.
"""

import errno
import os
import time
from _thread import allocate_lock

from libc.stdint cimport uint32_t, uint64_t

from overlayfs_py.engines.native cimport protocol
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

from overlayfs_py.config import MS_NOATIME
from overlayfs_py.core.requests import Caller
from overlayfs_py.engines import machine
from overlayfs_py.engines.beginning import Beginning
from overlayfs_py.engines.native.listing import Listings
from overlayfs_py.engines.native.workers import Workers
from overlayfs_py.engines.once import Once
from overlayfs_py.journal import Journal
from overlayfs_py.sys.descriptors import is_cut_off

cdef extern from "string.h" nogil:
    size_t strnlen(const char* text, size_t limit)

log = Journal(__name__)

# FUSE_INVALID_UIDGID
cdef uint32_t NOBODY = 0xFFFFFFFF

cdef uint64_t FOREVER = <uint64_t>0xFFFFFFFFFFFFFFFF

MAX_WRITE = 1 << 20
"""The most bytes of one WRITE unless an option asks for more: 256 pages, which the kernel allows by itself.

With fs.fuse.max_pages_limit at 4096, 512 MiB in writes of 8 MiB to a file in a tmpfs went at 0.8 GB/s with requests of 1,
0.8 with 4 and 1.0 with 16 MiB, over io_uring at 1.2, 1.0 and 1.0; reading with as much read ahead at 1.1, 1.2 and 1.2,
over io_uring at 1.4, 1.2 and 1.4. The daemon then held 16, 28 and 61 MiB.
"""
_MOST_PAGES = 0xFFFF  # what INIT's field holds

_LEAST_PAYLOAD = 128 << 10  # an extended attribute, whose name and value take a little over 64 KiB
_PAGE = os.sysconf("SC_PAGE_SIZE")

_LISTINGS = 64
_WORKERS = 8
# Threads for jobs, while so many are under way: a job may be the copying of a file that takes minutes, and another one,
# as an fsync, is not to wait for it. Beyond that, operations wait before they open anything.
_MOST_WORKERS = 64
# Reads and writes that wait for a thread of their own.
_MOST_WAITING = 64
# What all of these have open at most: a copy its source, itself and its directory.
DATA_DESCRIPTORS = 3 * _MOST_WORKERS + _WORKERS + _MOST_WAITING
_SIGKILL = 9
_LOOK = 0.05  # seconds between two looks whether who asks has been killed

UNSUPPORTED = frozenset()
"""Rows of core.ops.OPERATIONS that this engine can't serve."""

cdef Row rows[OPCODES]


cdef void serves(uint32_t opcode, Handler handler, size_t op_size, uint32_t how):
    """Enter what serves an opcode, behind a structure of how many bytes its names are, and how it is called."""
    rows[opcode].handler = handler
    rows[opcode].op_size = op_size
    rows[opcode].how = how


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

    cdef bytes entry_name(self):
        """As name, of an entry of a directory: EINVAL for what leads elsewhere, which the kernel doesn't send."""
        name = self.name()
        if not name or name in (b".", b"..") or b"/" in name:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
        return name

    cdef Py_ssize_t do_rest(self) except -2:
        """Do what was left for when the lock is free; the length of the answer."""
        function, arguments = self.rest
        self.rest = None
        return function(*arguments)

    cdef object asker(self):
        """The file system user id of who asks, -1 if that can't be told any more.

        Where mounts may map ids, the kernel names only those who make something.
        """
        if self.uid != NOBODY:
            return self.uid
        return next(iter(ids_of(self.pid, b"Uid:")[3:]), -1)

    cdef object in_group(self, Session session):
        """What tells whether who asks is in a group of the layers, or may do as if (setattr_should_drop_sgid)."""
        request, pid = self, self.pid

        def is_in(gid):
            groups = {*ids_of(pid, b"Gid:")[3:], *ids_of(pid, b"Groups:")}
            return session.fs.ids.gid_to_shown(gid) in groups or request.asker() == 0

        return is_in

    cdef object caller(self, uint32_t umask):
        return Caller(self.uid, self.gid, self.pid, umask)


class Watch:
    """Looks now and then whether who asks for something that takes long still waits for it.

    Nobody does once the connection is gone, nor does who has been killed.
    The kernel tells of a signal by INTERRUPT: once, whether that ends a process or not, and never where the signal came
    before a ring had the request. So that says too little, and is passed over. Who has been killed can't end before it
    has its answer.
    """

    __slots__ = ("fuse_fd", "next", "pid")

    def __init__(self, pid, fuse_fd):
        self.pid = pid
        self.fuse_fd = fuse_fd
        # What is done by then is done before anybody could have been told.
        self.next = time.monotonic() + _LOOK

    def gone(self):
        now = time.monotonic()
        if now < self.next:
            return False
        self.next = now + _LOOK
        return is_alone(self.pid, self.fuse_fd)


def is_alone(pid, fuse_fd):
    """Whether nobody waits for the answer to a request any more."""
    return dying(pid) or is_cut_off(fuse_fd)


def execute(job):
    """Execute a job, unless nobody waits for it any more by the time that there is a thread for it: it is given up then."""
    if job.unwanted():
        job.error, job.finished = OSError(errno.EINTR, os.strerror(errno.EINTR)), True
    else:
        job.execute()


def dying(pid):
    """Whether a fatal signal has reached a thread (proc(5), SigPnd); False where that can't be told."""
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            for line in status:
                if line.startswith(b"SigPnd:"):
                    return bool(int(line.split()[1], 16) & 1 << _SIGKILL - 1)
    except (FileNotFoundError, ProcessLookupError):
        # 0, or of another pid namespace than this /proc is of
        return False
    return False


def ids_of(pid, field):
    """The ids in a field of /proc/PID/status (proc(5)); none where the process has ended."""
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            for line in status:
                if line.startswith(field):
                    return [int(number) for number in line.split()[1:]]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return []


cdef size_t op_size(uint32_t opcode, Session session):
    """Bytes of the structure in front of a request's names; before 7.33 that of SETXATTR was shorter."""
    if opcode == protocol.SETXATTR and not session.long_setxattr:
        return sizeof(protocol.setxattr_in) // 2
    return rows[opcode].op_size if opcode < OPCODES else 0


cdef class Session:
    """The state of one connection."""

    def __init__(self, fs, fuse_fd, *, want_uring=False, beginning=None):
        self.fs = fs
        self.fuse_fd = fuse_fd
        self.beginning = beginning or Beginning(b"")
        self.want_uring = want_uring
        self.keeps_atimes = not fs.config.mount_flags & MS_NOATIME
        self.uring = False
        self.lock = allocate_lock()
        self.pool = None
        self.movers = Workers(max(_WORKERS, os.cpu_count() or 1))
        self.flushing = Workers(1)
        self.running = {}
        self.listings = Listings(_LISTINGS)
        self.plain = Plain(fs)
        self.ahead = Ahead(self.plain)
        self.warm = Warm(self.plain)
        self.closing = Closing()
        fs.close_later = self.closing.later
        self.pace = Pace(machine.open_latency(fs.config.cpu_latency), fuse_fd)
        self.pipes = Pipes()
        self.direct = Direct(fs, self.plain, self.lock)
        self.generations = Generations(fs)
        self.through = Passthrough(fs, fuse_fd)
        self.pruning = Pruning(fs, fuse_fd, self.workers)
        # A page is what the kernel sends even where it is told to send less.
        most = max(MAX_WRITE, min(machine.most_pages() or 0, _MOST_PAGES) * _PAGE)
        self.max_write = max(_PAGE, min(fs.config.max_write or MAX_WRITE, most) // _PAGE * _PAGE)
        self.payload = max(self.max_write, _LEAST_PAYLOAD)
        # The kernel knows no allow_root: the mount lets everybody in, and others are turned away here. The user who
        # mounts is root, too.
        self.only_root = fs.config.allow_root
        timeout = fs.config.timeout
        if timeout == float("inf"):
            self.timeout, self.timeout_nsec = FOREVER, 0
        else:
            self.timeout, self.timeout_nsec = int(timeout), int(timeout % 1 * 1_000_000_000)

    cdef bint handle(self, Request r):
        """Serve a request; True when r.error and r.length are the answer, False when it comes later."""
        cdef Py_ssize_t length
        cdef Row* row = &rows[r.opcode] if r.opcode < OPCODES else &rows[0]
        self.pace.note()
        if self.only_root and r.uid != 0 and not row.how & OPEN_TO_ALL:
            r.error, r.length = errno.EACCES, 0
            return True
        if row.handler is NULL:
            r.error, r.length = errno.ENOSYS, 0
            return True
        if self.pruning.limit and (r.opcode == protocol.LOOKUP or r.opcode == protocol.READDIRPLUS):
            self.pruning.hold_back()
        r.error = 0
        try:
            if row.how & UNLOCKED:
                length = row.handler(self, r)
            else:
                with self.lock:
                    length = row.handler(self, r)
            if length == DEFERRED:
                return False
            r.length = length
        except OSError as error:
            self.fail(r, error)
        except OverflowError:
            # A number beyond those of C, which the kernel doesn't send.
            r.error, r.length = errno.EINVAL, 0
        except Exception:  # a request that goes wrong in an unknown way is answered, logged, survived
            log.exception("unexpected error in opcode %d on node %d: EIO answered", r.opcode, r.nodeid)
            r.error, r.length = errno.EIO, 0
        return True

    cdef fail(self, Request r, object error):
        number = error.errno or errno.EIO
        # The kernel takes ENOSYS for "never ask again": only what answers so by design says it.
        if number == errno.ENOSYS and not isinstance(error, NeverAsk):
            number = errno.EOPNOTSUPP
        r.error, r.length = number, 0

    cdef Py_ssize_t run(self, Request r, object steps, object finish) except -2:
        """Run an operation under the lock, which is held; its jobs, if it hands out any, in another thread.

        `finish(session, request, value)` writes the answer and returns its length, or UNFINISHED.
        """
        if len(self.running) >= _MOST_WORKERS:
            self.workers().submit(self._continue, r, steps, None, None, finish)
            return DEFERRED
        try:
            job = self.advance(steps)
        except StopIteration as stop:
            return finish(self, r, stop.value)
        owned = self.owns(r, job)
        try:
            self.workers().submit(self._continue, r, steps, job, owned, finish)
        except OSError:
            # Without a thread nobody else waits for the job, either.
            if owned is not None:
                del self.running[job]
            steps.close()
            raise
        return DEFERRED

    cdef bint hand_over(self, Request r, run, arguments) except -1:
        """Have `run` called in a thread for data, and what it returns answered as the length; False where none is free.

        A thread that is the only one of its processor has it wait for one instead, unless many do.
        """
        or_not = not r.pinned or self.movers.waiting() >= _MOST_WAITING
        try:
            return self.movers.submit(self._answer, r, run, arguments, or_not=or_not)
        except OSError:
            # no thread to be had
            return False

    cdef ask_disk(self):
        """Ask it for what is to be read next, in another thread; not at all where that would have to wait."""
        opened = self.warm.take()
        if opened is None:
            return
        try:
            taken = self.movers.submit(self.warm.ask, opened, or_not=True)
        except OSError:
            # no thread to be had
            taken = False
        if not taken:
            for fd in opened:
                os.close(fd)

    def _answer(self, Request r, run, arguments):
        try:
            length = run(*arguments)
            if length == DEFERRED:
                return
            r.error, r.length = 0, length
        except OSError as error:
            self.fail(r, error)
        except Exception:
            log.exception("unexpected error in opcode %d on node %d: EIO answered", r.opcode, r.nodeid)
            r.error, r.length = errno.EIO, 0
        r.transport.reply(r)

    cpdef object workers(self):
        """The threads that execute jobs, which a mount that changes nothing never needs."""
        if self.pool is None:
            self.pool = Workers(_MOST_WORKERS, _WORKERS)
        return self.pool

    cdef object advance(self, object steps):
        job = next(steps)
        # One that has run, but is not committed yet, is to be waited for.
        while job.finished and job not in self.running:
            job = next(steps)
        return job

    cdef object owns(self, Request r, object job):
        """The signal that says that `job` is committed, if it is for this caller to execute; None if it is another's."""
        if job in self.running:
            return None
        job.unwanted = Watch(r.pid, self.fuse_fd).gone
        self.running[job] = Once()
        return self.running[job]

    def _continue(self, Request r, steps, job, owned, finish):
        """Execute an operation's jobs one after the other, then answer; in a worker thread.

        Without a job it has not begun yet.
        """
        try:
            if job is None:
                if is_alone(r.pid, self.fuse_fd):
                    raise OSError(errno.EINTR, os.strerror(errno.EINTR))
                job, owned = self._advance(r, steps, finish)
            while job is not None:
                job, owned = self._step(r, steps, job, owned, finish)
            if r.length == UNFINISHED:
                r.length = r.do_rest()
        except OSError as error:
            self.fail(r, error)
        except OverflowError:
            r.error, r.length = errno.EINVAL, 0
        except Exception:
            log.exception("unexpected error in opcode %d on node %d: EIO answered", r.opcode, r.nodeid)
            r.error, r.length = errno.EIO, 0
        try:
            with self.lock:
                # Does nothing unless it was given up.
                steps.close()
        except Exception:
            # What an operation leaves behind is nothing that who asks could wait for.
            log.exception("unexpected error in giving up opcode %d on node %d", r.opcode, r.nodeid)
        r.transport.reply(r)

    def _step(self, Request r, steps, job, owned, finish):
        if owned is None:
            self._wait(r, job)
        try:
            if owned is not None:
                execute(job)
            return self._advance(r, steps, finish)
        finally:
            if owned is not None:
                del self.running[job]
                owned.happen()

    def _advance(self, Request r, steps, finish):
        """The next job of an operation, and what says that it is committed; None twice where the operation has ended."""
        with self.lock:
            try:
                job = self.advance(steps)
                return job, self.owns(r, job)
            except StopIteration as stop:
                r.error, r.length = 0, finish(self, r, stop.value)
                return None, None

    def _wait(self, Request r, job):
        """Wait until whoever executes a job has committed it; raises EINTR where who asks has been killed meanwhile."""
        event = self.running.get(job)
        while event is not None and not event.wait(_LOOK):
            if dying(r.pid):
                raise OSError(errno.EINTR, os.strerror(errno.EINTR))

    cdef object node(self, uint64_t node_id):
        return self.fs.node(node_id)

    def close(self):
        """Wait for what is under way; the connection is gone."""
        self.ahead.close()
        self.pace.close()
        self.movers.close()
        self.flushing.close()
        with self.lock:
            # Made, if it wasn't, so that nobody makes it from now on: where one loop has failed, others may still serve.
            pool = self.workers()
        pool.close()
        self.warm.close()
        self.fs.close_later = os.close
        self.closing.close()
        self.pipes.close()


class NeverAsk(OSError):
    """The answer after which the kernel does without this request."""


cdef Py_ssize_t never_ask() except -2:
    raise NeverAsk(errno.ENOSYS, "")


def nothing(session, request, value):
    """Finish an operation whose answer is empty."""
    return 0
