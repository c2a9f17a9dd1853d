# cython: language_level=3, annotation_typing=False
"""Extended attributes by directory and name, in one system call each where the kernel has it (Linux 6.13)."""

from libc.errno cimport ENOSYS, EPERM, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memset

cdef extern from "<fcntl.h>" nogil:
    int AT_SYMLINK_NOFOLLOW

cdef extern from "<sys/xattr.h>" nogil:
    Py_ssize_t llistxattr(const char* path, char* list, size_t size)
    Py_ssize_t lgetxattr(const char* path, const char* name, void* value, size_t size)

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef extern from *:
    """
    struct xattr_args_v0 { unsigned long long value; unsigned int size; unsigned int flags; };
    """
    struct xattr_args_v0:
        uint64_t value
        uint32_t size
        uint32_t flags

cdef enum:
    # The numbers are the same on every architecture but alpha.
    SYS_GETXATTRAT = 464
    SYS_LISTXATTRAT = 465

cdef bint has_at_calls = True


cdef Py_ssize_t list_xattrs(int dir_fd, const char* name, char* keys, size_t size) noexcept nogil:
    global has_at_calls
    cdef char path[320]
    cdef Py_ssize_t length
    if has_at_calls:
        length = syscall(SYS_LISTXATTRAT, dir_fd, name, AT_SYMLINK_NOFOLLOW, keys, size)
        if length >= 0 or (errno != ENOSYS and errno != EPERM):
            return length
        has_at_calls = False
    snprintf(path, sizeof(path), b"/proc/self/fd/%d/%s", dir_fd, name)
    return llistxattr(path, keys, size)


cdef Py_ssize_t get_xattr(int dir_fd, const char* name, const char* key, char* value, size_t size):
    global has_at_calls
    cdef char path[320]
    cdef Py_ssize_t length
    cdef xattr_args_v0 arguments
    if has_at_calls:
        memset(&arguments, 0, sizeof(arguments))
        arguments.value = <uint64_t>value
        arguments.size = <uint32_t>size
        length = syscall(SYS_GETXATTRAT, dir_fd, name, AT_SYMLINK_NOFOLLOW, key, &arguments, sizeof(arguments))
        if length >= 0 or errno not in (ENOSYS, EPERM):
            return length
        has_at_calls = False
    snprintf(path, sizeof(path), b"/proc/self/fd/%d/%s", dir_fd, name)
    return lgetxattr(path, key, value, size)
