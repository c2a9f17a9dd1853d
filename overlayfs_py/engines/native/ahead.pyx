# cython: language_level=3, annotation_typing=False
"""Directories read ahead of whoever walks a tree, by a thread of their own that needs no interpreter.

A walk asks for one directory after the other, and who serves it is idle while the walker looks at what it got. Most
walkers go down first, in the order of the listing. So, once that has come true a few times, the directories that come
next are listed, and their entries looked at, before they are asked for; what was found is kept for that one question.
And of a directory that takes several answers to list, the entries of the next one are looked at while the last one is
read. It is only of directories that are one lower layer's alone, which don't change while they are mounted. Whatever
goes wrong, or needs a decision, is left to the usual way.
"""

from libc.errno cimport EOPNOTSUPP, errno
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, strlen, strncmp
from posix.unistd cimport close

from overlayfs_py.core.nodes cimport Node, Real
from overlayfs_py.engines.native.background cimport (
    Background, pthread_cond_broadcast, pthread_cond_wait, pthread_mutex_lock, pthread_mutex_unlock
)
from overlayfs_py.engines.native.plain cimport (
    AT_SYMLINK_NOFOLLOW, DT_CHR, DT_UNKNOWN, KEYS, LISTING, O_CLOEXEC, O_DIRECTORY, O_NOFOLLOW, O_PATH, O_RDONLY, Plain,
    S_ISCHR, dirent64, fstatat, getdents64, memmem, openat, record
)
from overlayfs_py.engines.native.xattrs cimport list_xattrs

cdef enum:
    DIRECTORY = 0o040000

    # What a slot holds: nothing, a directory to read, one that is being read, one that has been.
    FREE = 0
    QUEUED = 1
    RUNNING = 2
    DONE = 3

    MOST_BYTES = 256 << 10  # of one directory; a larger one is read as it is asked for
    PART = 256  # entries of such a one
    MOST_EXPECTED = 512  # directories
    # How often an expectation has to come true before anything is read on its account.
    ENOUGH = 2
    MOST_HITS = 8


cdef class Prepared:
    """The entries of one directory, with their attributes."""

    def __dealloc__(self):
        free(self.memory)

    cdef list names(self):
        return list(self.places)

    cdef record* find(self, bytes name):
        """What was found of `name`; NULL where that is nothing."""
        place = self.places.get(name)
        return NULL if place is None else <record*>(self.memory + <size_t>place)


cdef class Ahead(Background):
    """The directories expected next. All but the thread's own work is called with the session's lock held."""

    def __init__(self, Plain plain):
        self.plain = plain
        # Elsewhere, what is read ahead may change before it is asked for.
        self.on = plain.for_ever and plain.as_stored
        self.prefix, self.prefix_length = plain.prefix, len(plain.prefix)
        # The ids of directories that a walk has yet to enter, the next one last.
        self.expected = {}
        self.keys = [None] * SLOTS
        for one in range(SLOTS):
            self.slots[one].fd = -1

    def __dealloc__(self):
        for one in range(SLOTS):
            free(self.slots[one].memory)
            free(self.slots[one].wanted)

    cdef Prepared visit(self, Node node):
        """Note that a directory is being listed; what has been read of it already, or None."""
        cdef Prepared found = None
        if not self.on:
            return None
        if self.expected.pop(node.id, None) is None:
            self.hits //= 2
        elif self.hits < MOST_HITS:
            self.hits += 1
        if self.running is not None and self._is_plain(node):
            found = self._take(<Real>node.below)
        if self.hits >= ENOUGH:
            self._read_next()
        return found

    cdef expect(self, list directories):
        """Expect these directories to be listed next, in this order."""
        cdef Node node
        if not self.on:
            return
        for node in reversed(directories):
            self.expected.pop(node.id, None)
            self.expected[node.id] = node.id
        while len(self.expected) > MOST_EXPECTED:
            del self.expected[next(iter(self.expected))]
        if self.hits >= ENOUGH:
            self._read_next()

    cdef bint _is_plain(self, Node node):
        return (
            node.kind == DIRECTORY
            and node.upper is None
            and type(node.below) is Real
            and not node.removed
        )

    cdef _read_next(self):
        """See that the directories expected next are being read, the very next one first."""
        cdef Node node
        cdef Real real
        cdef list wanted = []
        cdef int number, fd
        for node_id in reversed(self.expected):
            node = self.plain.nodes.by_id.get(node_id)
            if node is not None and self._is_plain(node) and (<Real>node.below).parent is not None:
                wanted.append(node)
            if len(wanted) == SLOTS // 2:
                break
        for node in reversed(wanted):
            real = <Real>node.below
            number = self._slot_for(real)
            if number < 0:
                continue
            fd = self._open(real.parent, real.name, O_RDONLY)
            if fd >= 0:
                self._queue(number, real, fd, None)

    cdef Prepared follow(self, Node node, object listing, Py_ssize_t index, Py_ssize_t own):
        """What has been found of a listing's entries from `index` on, and have those behind them looked at.

        It is of the entries before `listing.known`; where nothing has been found, the caller looks at `own` of them.
        """
        cdef Prepared found = None
        cdef list entries = listing.entries
        cdef int fd
        if not self.on or not self._is_plain(node):
            listing.known = len(entries)
            return None
        if listing.queued >= 0:
            found = self._take(listing)
        if found is not None and listing.queued == index:
            index = min(index + PART, len(entries))
        else:
            found = None
            index = min(index + own, len(entries))
        listing.known, listing.queued = index, -1
        known = node.children or {}
        wanted = [name for _, name in entries[index : index + PART] if name not in known]
        if wanted:
            fd = self._open(<Real>node.below, b".", O_PATH)
            if fd >= 0 and self._queue(self._slot_for(listing), listing, fd, b"\0".join(wanted) + b"\0"):
                listing.queued = index
        return found

    cdef int _open(self, Real parent, bytes name, int flags):
        """A descriptor of a directory; -1 where there is none, which whoever asks for it will be told."""
        cdef int dir_fd
        try:
            dir_fd = self.plain.dirs.fd(parent)
        except OSError:
            return -1
        return openat(dir_fd, name, flags | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)

    cdef int _slot_for(self, object key):
        """The slot for what is to be read next; -1 where it is being read, or has been."""
        cdef int one
        cdef int oldest = -1
        pthread_mutex_lock(&self.mutex)
        self.stamp += 1
        for one in range(SLOTS):
            if self.keys[one] is key:
                self.slots[one].stamp = self.stamp
                oldest = -1
                break
            if self.slots[one].state != RUNNING and (oldest < 0 or self.slots[one].stamp < self.slots[oldest].stamp):
                oldest = one
        pthread_mutex_unlock(&self.mutex)
        return oldest

    cdef bint _queue(self, int number, object key, int fd, bytes wanted) except -1:
        """Have a directory read into a slot, or of `wanted` in it; False where it can't be. Takes over the descriptor."""
        cdef slot* one = &self.slots[number]
        cdef char* names = NULL
        if number < 0 or not self.begun():
            close(fd)
            # Without a thread, nothing is read ahead any more.
            self.on = self.on and number < 0
            return False
        if wanted is not None:
            names = <char*>malloc(len(wanted))
            if names is NULL:
                close(fd)
                return False
            memcpy(names, <const char*>wanted, len(wanted))
        pthread_mutex_lock(&self.mutex)
        if one.state == RUNNING:
            # taken up meanwhile
            pthread_mutex_unlock(&self.mutex)
            free(names)
            close(fd)
            return False
        if one.fd >= 0:
            close(one.fd)
        free(one.wanted)
        self.keys[number] = key
        one.fd, one.wanted, one.size = fd, names, len(wanted) if wanted is not None else 0
        one.stamp, one.state = self.stamp, QUEUED
        pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.mutex)
        return True

    cdef Prepared _take(self, object key):
        """What has been read; what is being read is waited for, what is not is left."""
        cdef Prepared found
        cdef slot* one = NULL
        cdef size_t at = 0
        cdef record* entry
        cdef bint done
        for index in range(SLOTS):
            if self.keys[index] is key:
                one = &self.slots[index]
                self.keys[index] = None
                break
        if one is NULL:
            return None
        with nogil:
            pthread_mutex_lock(&self.mutex)
            while one.state == RUNNING:
                pthread_cond_wait(&self.changed, &self.mutex)
            done = one.state == DONE
            one.state = FREE
            pthread_mutex_unlock(&self.mutex)
        # A slot is the thread's own only from when it is queued until it is done.
        if one.fd >= 0:
            close(one.fd)
            one.fd = -1
        if not done or one.memory is NULL:
            return None
        found = Prepared()
        found.memory, found.places = one.memory, {}
        one.memory = NULL
        while at < one.used:
            entry = <record*>(found.memory + at)
            found.places[(found.memory + at + sizeof(record))[: entry.length]] = at
            at += room_of(entry.length)
        return found

    cdef void work(self) noexcept nogil:
        """Read what is queued, the newest first, until the end."""
        cdef int one, newest
        pthread_mutex_lock(&self.mutex)
        while not self.ended:
            newest = -1
            for one in range(SLOTS):
                if self.slots[one].state == QUEUED and (newest < 0 or self.slots[one].stamp > self.slots[newest].stamp):
                    newest = one
            if newest < 0:
                pthread_cond_wait(&self.changed, &self.mutex)
                continue
            self.slots[newest].state = RUNNING
            pthread_mutex_unlock(&self.mutex)
            self._fill(&self.slots[newest])
            pthread_mutex_lock(&self.mutex)
            self.slots[newest].state = DONE
            pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.mutex)

    cdef void _fill(self, slot* one) noexcept nogil:
        """Read a directory, or of some names in it, into a slot; what can't be read leaves it without memory."""
        cdef size_t at = 0
        cdef bint done = True
        one.used = 0
        if one.wanted is NULL:
            done = self._list(one)
        while at < one.size:
            # What needs a decision, or is gone, is left to who asks for it.
            self._look_at(one, one.wanted + at)
            at += strlen(one.wanted + at) + 1
        if not done:
            free(one.memory)
            one.memory = NULL
        free(one.wanted)
        one.wanted, one.size = NULL, 0
        close(one.fd)
        one.fd = -1

    cdef bint _list(self, slot* one) noexcept nogil:
        """Read all of a directory; False where that can't be done, or it holds what needs a decision."""
        cdef char buffer[LISTING]
        cdef dirent64* name
        cdef Py_ssize_t at
        cdef Py_ssize_t length = getdents64(one.fd, buffer, LISTING)
        while length > 0:
            at = 0
            while at < length:
                name = <dirent64*>(buffer + at)
                at += name.d_reclen
                if name.d_name[0] == c"." and (
                    name.d_name[1] == 0 or (name.d_name[1] == c"." and name.d_name[2] == 0)
                ):
                    continue
                if name.d_type == DT_CHR or name.d_type == DT_UNKNOWN or not self._look_at(one, name.d_name):
                    return False
            length = getdents64(one.fd, buffer, LISTING)
        return length == 0

    cdef bint _look_at(self, slot* one, const char* name) noexcept nogil:
        """Keep one entry; False where that can't be done, or it needs a decision."""
        cdef char keys[KEYS]
        cdef char* memory
        cdef record* entry
        cdef Py_ssize_t listed
        cdef size_t length = strlen(name)
        if strncmp(name, b".wh.", 4) == 0 or one.used + room_of(length) > MOST_BYTES:
            return False
        memory = <char*>realloc(one.memory, grown(one.used + room_of(length)))
        if memory is NULL:
            return False
        one.memory = memory
        entry = <record*>(memory + one.used)
        if fstatat(one.fd, name, &entry.st, AT_SYMLINK_NOFOLLOW) != 0 or S_ISCHR(entry.st.st_mode):
            return False
        listed = list_xattrs(one.fd, name, keys, KEYS)
        if listed < 0:
            entry.marked = errno != EOPNOTSUPP
        else:
            entry.marked = listed > 0 and memmem(keys, listed, self.prefix, self.prefix_length) != NULL
        entry.length = <unsigned short>length
        memcpy(memory + one.used + sizeof(record), name, length)
        one.used += room_of(length)
        return True

    def close(self):
        """End the thread, and let go of what it has read."""
        self.end()
        for one in range(SLOTS):
            if self.slots[one].fd >= 0:
                close(self.slots[one].fd)
                self.slots[one].fd = -1


cdef inline size_t room_of(size_t length) noexcept nogil:
    """The bytes of an entry with a name of `length`."""
    return (sizeof(record) + length + 7) & ~<size_t>7


cdef inline size_t grown(size_t needed) noexcept nogil:
    """The room to have for `needed` bytes: realloc takes no time where it stays the same."""
    return (needed + 4095) & ~<size_t>4095
