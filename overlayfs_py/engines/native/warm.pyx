# cython: language_level=3, annotation_typing=False
"""Files that a disk is asked for before they are read, where one file of a directory is read after the other.

Whoever copies, packs or searches a tree reads small files one by one, and waits for the disk each time. So, once reads
have waited a few times and each was of the file that comes next in its directory, the disk is asked for the files
behind it, more of them each time that this comes true, and for the first ones of directories that are listed. All this
does is to have the layer's filesystem read ahead into the page cache: nothing is kept here, and whatever goes wrong is
left to the read itself. Another thread does it, as that may take long, too.
"""

import os

from posix.unistd cimport close

from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native.pipes cimport RWF_NOWAIT, iovec, preadv2
from overlayfs_py.engines.native.plain cimport Plain, stat

cdef extern from "<fcntl.h>" nogil:
    int POSIX_FADV_WILLNEED
    int posix_fadvise(int fd, long offset, long length, int advice)

cdef enum:
    REGULAR = 0o100000

    # How often the next file has to be the one that is read before any is asked for on that account.
    ENOUGH = 2
    MOST_HITS = 8
    # Files of a directory asked for at once: at first, and at most; of all directories; and bytes of each.
    FEW = 4
    MANY = 32
    IN_ALL = 64
    BYTES = 128 << 10
    # So many in a row that are in the page cache already show that the rest is, too.
    CACHED = 8
    # Who reads in a larger directory rarely reads all of it, and to put it in order takes long.
    LARGEST = 2000


cdef class Place:
    """How far a directory has got."""


cdef class Warm:
    """The files of one overlay that are read next. All but ask() is called with the session's lock held."""

    def __init__(self, Plain plain):
        self.plain = plain
        self.asked = {}
        self.opened = []
        self.window = FEW

    cdef begin(self, Node parent):
        """Note that a directory has been listed."""
        if self.hits >= ENOUGH and self.cached < CACHED and parent.children is not None:
            self._choose(self._place(parent))

    cdef bint visit(self, Node node) except -1:
        """Note that a file is being read from its start; whether the disk has been asked for it."""
        cdef Place place = self.asked.pop(node, None)
        if place is None:
            return False
        place.asked -= 1
        self.hits = min(self.hits + 1, MOST_HITS)
        self.window = min(2 * self.window, MANY)
        self._choose(place)
        return True

    cdef waited(self, Node node):
        """Note that a read of a file from its start, which the disk had not been asked for, has waited for it."""
        cdef Place place = self.last
        if node.removed or node.parent is None or node.parent.children is None:
            return
        if node is self.expected:
            self.hits = min(self.hits + 1, MOST_HITS)
        elif self.expected is not None:
            self._miss()
        self.cached = 0
        if (
            place is None
            or place.parent is not node.parent
            or place.next >= len(place.order)
            or place.order[place.next] is not node
        ):
            place = self._place(node.parent)
            if node not in place.order:
                return
            place.next = place.order.index(node)
        place.next += 1
        self.expected = place.order[place.next] if place.next < len(place.order) else None
        if self.hits >= ENOUGH:
            self._choose(place)

    cdef list take(self):
        """The descriptors of files to ask the disk for, whose owner the caller is from now on; None for none."""
        if not self.opened:
            return None
        opened, self.opened = self.opened, []
        return opened

    def ask(self, list opened):
        """Have the disk read the beginnings of files, and close them; without the lock."""
        cdef char byte
        cdef iovec part
        cdef int fd
        cdef int cached = self.cached
        part.iov_base, part.iov_len = &byte, 1
        for fd in opened:
            with nogil:
                if preadv2(fd, &part, 1, 0, RWF_NOWAIT) > 0:
                    cached += 1
                else:
                    cached = 0
                    posix_fadvise(fd, 0, BYTES, POSIX_FADV_WILLNEED)
                close(fd)
        self.cached = cached

    cdef _miss(self):
        self.hits //= 2
        self.window = FEW

    cdef Place _place(self, Node parent):
        """Take up a directory at its beginning."""
        cdef Node child
        cdef Place place = Place()
        place.parent = parent
        place.order = []
        if len(parent.children) <= LARGEST:
            place.order = [child for child in parent.children.values() if child.kind == REGULAR]
        self.last = place
        return place

    cdef _choose(self, Place place):
        """Open those of a directory that the disk is to be asked for."""
        cdef Place other
        while place.next < len(place.order) and place.asked < self.window and self.cached < CACHED:
            node = place.order[place.next]
            place.next += 1
            if node in self.asked:
                continue
            if not self._open(node):
                break
            self.asked[node] = place
            place.asked += 1
            self.expected = None
            if len(self.asked) > IN_ALL:
                # Nobody has read it since.
                other = self.asked.pop(next(iter(self.asked)))
                other.asked -= 1
                self._miss()

    cdef bint _open(self, Node node) except -1:
        """Open a file for ask(); False where it is no plain one any more, or whatever else goes wrong."""
        cdef stat st
        cdef int fd
        if node.removed or node.parent is None or len(self.opened) >= MANY:
            return False
        try:
            fd = self.plain.open(node, &st)
        except OSError:
            # of its directory: whoever reads it will be told
            return False
        if fd < 0:
            return False
        self.opened.append(fd)
        return True

    def close(self):
        for fd in self.opened:
            os.close(fd)
        self.opened = []
