cdef Py_ssize_t list_xattrs(int dir_fd, const char* name, char* keys, size_t size) noexcept nogil
cdef Py_ssize_t get_xattr(int dir_fd, const char* name, const char* key, char* value, size_t size)
