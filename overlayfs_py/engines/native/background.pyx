# cython: language_level=3, annotation_typing=False
"""A thread that works without the interpreter beside those that serve, begun when it is first needed."""

from _thread import allocate_lock, start_new_thread

from overlayfs_py.engines.native.workers import unpin

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t* mutex, void* attributes)
    int pthread_mutex_destroy(pthread_mutex_t* mutex)


cdef class Background:
    """What such a thread shares with the others; what it does is a subclass's work()."""

    def __cinit__(self):
        pthread_mutex_init(&self.mutex, NULL)
        pthread_cond_init(&self.changed, NULL)

    def __dealloc__(self):
        pthread_cond_destroy(&self.changed)
        pthread_mutex_destroy(&self.mutex)

    cdef bint begun(self) except -1:
        """Whether the thread runs, which is started if it doesn't; False where there may be no more of them."""
        if self.running is not None:
            return True
        running = allocate_lock()
        running.acquire()
        try:
            start_new_thread(self._run, (running,))
        except RuntimeError:
            return False
        self.running = running
        return True

    def _run(self, running):
        try:
            unpin()
            with nogil:
                self.work()
        finally:
            running.release()

    cdef void work(self) noexcept nogil:
        """All that the thread does, until `ended` is set."""

    cdef end(self):
        """Tell the thread that it is to end, and wait until it has."""
        if self.running is None:
            return
        pthread_mutex_lock(&self.mutex)
        self.ended = True
        pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.mutex)
        self.running.acquire()
        self.running = None
