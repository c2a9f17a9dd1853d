cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)
    int pthread_cond_init(pthread_cond_t* condition, void* attributes)
    int pthread_cond_destroy(pthread_cond_t* condition)
    int pthread_cond_wait(pthread_cond_t* condition, pthread_mutex_t* mutex)
    int pthread_cond_signal(pthread_cond_t* condition)
    int pthread_cond_broadcast(pthread_cond_t* condition)


cdef class Background:
    # Held by the thread for as long as it runs.
    cdef object running
    # What is shared with the thread is under the mutex; `changed` tells it, or it tells, that there is something new.
    cdef bint ended
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t changed

    cdef bint begun(self) except -1
    cdef void work(self) noexcept nogil
    cdef end(self)
