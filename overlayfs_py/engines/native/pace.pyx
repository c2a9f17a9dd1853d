# cython: language_level=3, annotation_typing=False
"""What is done while one request comes right after the other: processors stay awake, and one thread fetches them all.

Who asks sleeps until the answer comes, and the daemon until the next request. On a virtual machine a processor without
work halts, which hands it to the host, and takes long to run again: half of a round trip and more. The kernel lets a
process say how long a processor may take to wake, PM QoS, and at 0 it looks for work instead of halting. That takes the
host's processor time, so it is said only while requests come thick and fast, and taken back some milliseconds after.
When the daemon ends, whichever way, the kernel takes it back.

With several threads waiting, the kernel wakes the one that has waited longest, so that each request comes to another
one, on another processor, which then waits for the interpreter. One alone takes a third less time, even for several
clients. For some microseconds it looks for the next request before it sleeps, as long as that mostly comes so soon. The
others stand by, and are called where a request takes long while another one waits, where more requests are always waiting
and there are processors for them, where the one is held up, and when requests come slower.

All of them may be held up, by a disk that is slow to take what is written. Then helpers fetch requests, further threads
that are begun when they are first needed, and stand by as soon as somebody else fetches.

This is all decided by a thread that needs the interpreter only to begin a helper.

Source: Documentation/power/pm_qos_interface.rst, Documentation/virt/guest-halt-polling.rst.
"""

import os

from libc.stdint cimport int64_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, nanosleep, timespec
from posix.unistd cimport write

from overlayfs_py.engines.native.background cimport (
    Background, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_signal, pthread_cond_wait,
    pthread_mutex_lock, pthread_mutex_unlock
)

from overlayfs_py.journal import Journal

cdef extern from *:
    """
    static int load(int *at) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
    static void add(int *at, int value) { __atomic_add_fetch(at, value, __ATOMIC_SEQ_CST); }
    """
    int load(int* at) nogil
    void add(int* at, int value) nogil

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int POLLIN
    int poll(pollfd* files, unsigned long count, int milliseconds)

log = Journal(__name__)

cdef enum:
    # All times are in nanoseconds. LOOK requests come in less than this if each follows the one before.
    SOON = 6_400_000
    # Between two looks whether they still do, which is so if in so many periods together so many have come.
    PERIOD = 3_000_000
    LOOKS = 3
    MANY = 16

    # A request that takes more time is not to keep others waiting, nor one with more bytes: for so long all fetch some,
    # at first, and at most where it happens again and again.
    LONG = 200_000
    LARGE = 64 << 10
    BRIEFLY = 10_000_000
    SHARED = 100_000_000
    # So many looks in a row that find a request waiting show more than one thread can serve.
    CROWD = 8

    # As many as libfuse has threads by default, less two.
    HELPERS = 8
    # Where one can't be begun, nobody tries again for so long.
    PAUSE = 1_000_000_000

    # Looking for the next request: one that comes raises hope by one, to this at most, and one that doesn't lowers it by
    # two. Without hope so many requests are slept for, and then there is another look.
    MOST_HOPES = 8
    OFF = 200

    NO_LIMIT = -1

MOST_HELPERS = HELPERS
"""Threads, each with a descriptor, that there may be besides those that a mount begins with."""


cdef class Pace(Background):
    """The pace of one mount's requests. What has no nogil is called with the interpreter held."""

    def __cinit__(self):
        self.fd = -1
        self.hopes = MOST_HOPES
        pthread_cond_init(&self.others, NULL)
        pthread_cond_init(&self.helpers, NULL)

    def __init__(self, fd, fuse_fd):
        """Tell the kernel through `fd`, which close() closes; if it is -1, it isn't told, and all threads fetch requests.

        Requests come through `fuse_fd`.
        """
        self.fd = fd
        self.fuse_fd = fuse_fd
        self.many_processors = len(os.sched_getaffinity(0)) > 2

    def __dealloc__(self):
        pthread_cond_destroy(&self.helpers)
        pthread_cond_destroy(&self.others)

    def help_by(self, begin):
        """Have helpers where all that fetch requests are held up: `begin` starts a further one.

        It may raise OSError or RuntimeError where it can't, and is called in a thread of its own.
        """
        self.begin, self.to_begin = begin, HELPERS
        self.helped = True

    cdef void fetch(self, bint helper) noexcept nogil:
        """Before a request is fetched: wait while another thread does that, and is to do so alone, or this is a helper."""
        if load(&self.fetching) > 0 and (helper or self.alone):
            pthread_mutex_lock(&self.mutex)
            if helper:
                self.standing_by += 1
                while self.called == 0 and not self.ended:
                    pthread_cond_wait(&self.helpers, &self.mutex)
                self.standing_by -= 1
                self.called = max(self.called - 1, 0)
            else:
                while self.alone:
                    pthread_cond_wait(&self.others, &self.mutex)
            pthread_mutex_unlock(&self.mutex)
        add(&self.fetching, 1)

    cdef void fetched(self) noexcept nogil:
        """After it."""
        add(&self.fetching, -1)

    cdef bint is_worth_looking(self) noexcept nogil:
        """Whether the next request is likely to come at once, so that to look for it is quicker than to sleep."""
        if self.hopes <= 0:
            self.hopes -= 1
        if self.hopes < -OFF:
            self.hopes = 1
        return self.hopes > 0

    cdef void has_looked(self, bint found) noexcept nogil:
        """Note what came of that."""
        self.hopes = min(self.hopes + 1, MOST_HOPES) if found else max(self.hopes - 2, 0)

    cdef void leave(self) noexcept nogil:
        """Fetch no more, as the connection has ended: those that stand by are to find out, too."""
        pthread_mutex_lock(&self.mutex)
        self.ended = True
        self.alone = False
        pthread_cond_broadcast(&self.others)
        pthread_cond_broadcast(&self.helpers)
        pthread_mutex_unlock(&self.mutex)

    cdef void took(self, int64_t nanoseconds, size_t size) noexcept nogil:
        """Note how long a request took that is about to be answered, and its bytes; call the others where such ones
        keep some waiting. Whoever asks for one thing after the other has nothing waiting before it is answered."""
        if size > LARGE or (nanoseconds > LONG and is_waiting(self.fuse_fd, 0)):
            self._share()
        elif self.many_processors and self.count % LOOK == 0:
            self.waiting = self.waiting + 1 if is_waiting(self.fuse_fd, 0) else 0
            if self.waiting >= CROWD:
                self.waiting = 0
                self._share()

    cdef void _share(self) noexcept nogil:
        pthread_mutex_lock(&self.mutex)
        self._share_a_while()
        self.alone = False
        pthread_cond_broadcast(&self.others)
        pthread_mutex_unlock(&self.mutex)

    cdef void _share_a_while(self) noexcept nogil:
        """Have all fetch requests, for longer where they had to a moment ago; under the mutex."""
        cdef int64_t now = monotonic()
        self.shared = min(2 * self.shared, SHARED) if now - self.shared_until < SHARED else BRIEFLY
        self.shared_until = now + self.shared

    cdef _look(self):
        """See whether requests follow one another, and wake the thread if so."""
        cdef int64_t before = self.looked
        self.looked = monotonic()
        if self.looked - before > SOON or self.ended:
            return
        if not self.begun():
            # Nothing is done any more.
            self.ended = True
            return
        self._have(&self.busy)

    cdef _have_guarded(self):
        """See whether it stays so that nobody fetches requests, in the thread."""
        if self.ended or not self.begun():
            self.helped = False
            return
        self._have(&self.guarded)

    cdef void _have(self, bint* wanted) noexcept nogil:
        """Have the thread do what is wanted."""
        pthread_mutex_lock(&self.mutex)
        wanted[0] = True
        pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.mutex)

    cdef void work(self) noexcept nogil:
        """What the thread does, until the end."""
        pthread_mutex_lock(&self.mutex)
        while not self.ended:
            if self.busy:
                self._keep_awake()
            elif self.guarded:
                self._guard()
            else:
                pthread_cond_wait(&self.changed, &self.mutex)
        pthread_mutex_unlock(&self.mutex)

    cdef void _keep_awake(self) noexcept nogil:
        """Tell the kernel that requests follow one another until they no longer do; under the mutex."""
        cdef uint64_t before
        cdef uint64_t counts[LOOKS]
        cdef int look = 0
        cdef bint alone, held_up = False
        if self._tell(0):
            for index in range(LOOKS):
                counts[index] = self.count - MANY
            while not self.ended and self.count - counts[look] >= MANY:
                counts[look] = before = self.count
                look = (look + 1) % LOOKS
                self.alone = alone = not held_up and monotonic() > self.shared_until
                self._rest()
                held_up = self.count == before and load(&self.fetching) == 0
                if held_up:
                    self._call_others()
                    if not alone:
                        self._call_helper()
            self._tell(NO_LIMIT)
        self.busy = False
        self.guarded = self.helped
        self._call_others()

    cdef void _guard(self) noexcept nogil:
        """Call a helper where nobody fetches requests for a while; under the mutex."""
        cdef uint64_t before = self.count
        self._rest()
        # In this order, which the addition keeps: who fetches the last request after the look finds nobody on guard.
        self.guarded = False
        add(&self.fetching, 0)
        if load(&self.fetching) == 0:
            self.guarded = True
            if self.count == before:
                self._call_helper()

    cdef void _rest(self) noexcept nogil:
        """Sleep for a period; under the mutex, which is free meanwhile."""
        cdef timespec period
        period.tv_sec, period.tv_nsec = 0, PERIOD
        pthread_mutex_unlock(&self.mutex)
        nanosleep(&period, NULL)
        pthread_mutex_lock(&self.mutex)

    cdef void _call_helper(self) noexcept nogil:
        """Have one fetch requests if one is waiting; under the mutex, which is free meanwhile."""
        if not self.helped or not is_waiting(self.fuse_fd, 0):
            return
        if self.called < self.standing_by:
            self.called += 1
            pthread_cond_signal(&self.helpers)
        elif self.to_begin > 0 and monotonic() > self.begin_after:
            # Who has the interpreter may be waiting for the mutex.
            pthread_mutex_unlock(&self.mutex)
            with gil:
                self._begin_helper()
            pthread_mutex_lock(&self.mutex)

    cdef void _begin_helper(self) noexcept:
        """Begin one more."""
        try:
            self.begin()
            self.to_begin -= 1
        except (OSError, RuntimeError, MemoryError) as error:
            if self.begin_after == 0:
                log.warning("all threads that fetch requests are held up, and there is no further one: %s", error)
            self.begin_after = monotonic() + PAUSE

    cdef void _call_others(self) noexcept nogil:
        """Have those that stand by fetch requests, too; under the mutex."""
        if load(&self.fetching) == 0 and is_waiting(self.fuse_fd, 0):
            # The only one that would fetch it is held up, and may be so again.
            self._share_a_while()
        self.alone = False
        pthread_cond_broadcast(&self.others)

    cdef bint _tell(self, int latency) noexcept nogil:
        """Tell the kernel how many microseconds a processor may take to wake, until it is told otherwise."""
        return write(self.fd, &latency, sizeof(latency)) == sizeof(latency)

    def close(self):
        """End the thread, and take back what the kernel was told."""
        self.end()
        self.helped, self.begin = False, None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


cdef bint is_waiting(int fuse_fd, int milliseconds) noexcept nogil:
    """Whether there is a request to be fetched, or the end of the connection, at once or after so long; -1: in the end."""
    cdef pollfd file
    file.fd, file.events = fuse_fd, POLLIN
    return poll(&file, 1, milliseconds) == 1


cdef int64_t monotonic() noexcept nogil:
    """Nanoseconds of the clock that only goes forward."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec
