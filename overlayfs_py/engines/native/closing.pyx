# cython: language_level=3, annotation_typing=False
"""Descriptors that another thread closes: the last one of a removed file gives its blocks back, and that takes long.

For a small file that takes longer than the removal of its name (17 and 10 µs on ext4), for one of 1 GiB 50 ms, and the
whole mount would wait: who forgets a node holds the session's lock.
"""

from libc.string cimport memcpy
from posix.time cimport nanosleep, timespec
from posix.unistd cimport close

from overlayfs_py.engines.native.background cimport (
    pthread_cond_broadcast, pthread_cond_wait, pthread_mutex_lock, pthread_mutex_unlock
)

cdef enum:
    # Nanoseconds in which more of them may come.
    PAUSE = 2_000_000

# Descriptors that may be open beyond those who are counted: those that wait, and those that are being closed.
CLOSED_LATER = 2 * ROOM


cdef class Closing(Background):
    """The descriptors of one mount that are closed later."""

    def later(self, int fd):
        """Close `fd` soon; at once where too many wait already, or where no thread is to be had."""
        cdef bint taken = False
        if self.begun():
            with nogil:
                pthread_mutex_lock(&self.mutex)
                taken = self.count < ROOM and not self.ended
                if taken:
                    self.descriptors[self.count] = fd
                    self.count += 1
                    if self.count == 1:
                        pthread_cond_broadcast(&self.changed)
                pthread_mutex_unlock(&self.mutex)
        if not taken:
            with nogil:
                close(fd)

    cdef void work(self) noexcept nogil:
        """Close what has been handed in, until the end, and what is left then."""
        cdef int taken[ROOM]
        cdef int count, index
        cdef timespec pause
        pause.tv_sec, pause.tv_nsec = 0, PAUSE
        pthread_mutex_lock(&self.mutex)
        while True:
            if self.count != 0 and not self.ended:
                # One after the other would wake this thread each time, in the way of who asks for the next removal.
                pthread_mutex_unlock(&self.mutex)
                nanosleep(&pause, NULL)
                pthread_mutex_lock(&self.mutex)
            count = self.count
            if count != 0:
                memcpy(taken, self.descriptors, count * sizeof(int))
                self.count = 0
                pthread_mutex_unlock(&self.mutex)
                for index in range(count):
                    close(taken[index])
                pthread_mutex_lock(&self.mutex)
            elif self.ended:
                break
            else:
                pthread_cond_wait(&self.changed, &self.mutex)
        pthread_mutex_unlock(&self.mutex)

    def close(self):
        """Wait until all are closed."""
        self.end()
