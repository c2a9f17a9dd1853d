# cython: language_level=3, annotation_typing=False
"""Requests about directories as lists of names."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native.ahead cimport Prepared
from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.answers cimport put_entry_at, put_plain_entry
from overlayfs_py.engines.native.plain cimport ABSENT, record
from overlayfs_py.engines.native.plain cimport stat as stat_t
from overlayfs_py.engines.native.session cimport FOREVER, OPEN_TO_ALL, UNLOCKED, Request, Session, never_ask, serves

from overlayfs_py.core import readdir as core_readdir
from overlayfs_py.core.ops import OPERATIONS
from overlayfs_py.engines.native.listing import Listing
from overlayfs_py.engines.native.session import nothing

_UNKNOWN_INO = 0xFFFFFFFF

cdef enum:
    DIRECTORY = 0o040000
    GONE = -1
    ENTRY = sizeof(protocol.entry_out) + sizeof(protocol.dirent) + 8  # bytes that one takes, with a short name


cdef Py_ssize_t do_opendir(Session s, Request r) except -2:
    # The kernel keeps the listing of a directory that it need not open, and looks at its mtime alone, which is the
    # upper part's.
    if s.timeout == FOREVER:
        return never_ask()
    memset(r.out, 0, sizeof(protocol.open_out))
    return sizeof(protocol.open_out)


cdef object listing_of(Session s, Request r, Node node, uint64_t offset):
    cdef Prepared prepared
    listing = s.listings.get(r.nodeid)
    if listing is None or offset == 0:
        prepared = s.ahead.visit(node)
        names = prepared.names() if prepared is not None else s.plain.names(node)
        if names is None:
            names = core_readdir.names(s.fs, node, s.plain.merge_layer)
        listing = Listing(names, prepared)
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
    cdef Py_ssize_t added
    cdef Node node = s.node(r.nodeid)
    cdef list directories = []
    if offset < 1:
        used += put_dirent(s, r.out, room, node, None, b".", 1, plus, False)
    if offset < 2:
        used += put_dirent(s, r.out + used, room - used, node.parent or node, None, b"..", 2, plus, False)
    listing = listing_of(s, r, node, offset)
    try:
        for index in range(listing.after(offset), len(listing.entries)):
            if plus and index >= listing.known:
                listing.prepared = s.ahead.follow(node, listing, index, (room - used) // ENTRY)
            position, name = listing.entries[index]
            if name in listing.removed:
                continue
            added = put_named(
                s, r.out + used, room - used, node, name, listing.prepared, position, plus, directories
            )
            if added == 0:
                break
            if added != GONE:
                used += added
        else:
            # All of it is told.
            listing.prepared = None
            if plus:
                s.warm.begin(node)
                s.ask_disk()
    except Exception:
        # What has been counted has to reach the kernel, or is never forgotten. The next request meets the error first.
        if used == 0:
            raise
    if directories and offset < 3:
        s.ahead.expect(directories)
    return used


cdef Py_ssize_t put_named(
    Session s,
    char* out,
    size_t room,
    Node parent,
    bytes name,
    Prepared prepared,
    uint64_t position,
    bint plus,
    list directories,
) except -2:
    """The entry of a name in a directory, with its attributes where `plus` is set; 0 without room, GONE without an object.

    One that is a directory itself is added to `directories`.
    """
    cdef Py_ssize_t added
    cdef bint counted = False
    cdef Node child = None
    cdef stat_t own
    cdef record* ahead
    try:
        ahead = prepared.find(name) if prepared is not None else NULL
        found = s.plain.prepared(parent, name, ahead)
        if found is not None:
            own = ahead.st
        else:
            found = s.plain.entry(parent, name, &own)
        if found is ABSENT:
            return GONE
        if found is not None:
            child, st = <Node>found, None
        else:
            child, st = OPERATIONS["lookup"](s.fs, parent, name)
        if found is None or not plus:
            added = put_dirent(s, out, room, child, st, name, position, plus, plus)
        else:
            added = put_name(out, room, name, position, True, child.id, child.kind >> 12)
            if added:
                put_plain_entry(s, <protocol.entry_out*>out, child, &own)
                child.lookups += 1
                if child.kind == DIRECTORY:
                    directories.append(child)
        counted = plus and added
        return added
    except FileNotFoundError:
        # since the listing was taken
        return GONE
    except OSError:
        # This name alone is broken: it is listed, and whoever uses it gets the error.
        kind = core_readdir.kind_of(s.fs, parent, name)
        return put_name(out, room, name, position, plus, _UNKNOWN_INO, kind >> 12)
    finally:
        if child is not None and not counted:
            # What the kernel gets no reference to doesn't stay for its sake.
            OPERATIONS["forget"](s.fs, child, 0)


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


cdef Py_ssize_t do_fsyncdir(Session s, Request r) except -2:
    cdef bint data_only = (<protocol.fsync_in*>r.op).fsync_flags & protocol.FSYNC_FDATASYNC
    return s.run(r, OPERATIONS["fsyncdir"](s.fs, s.node(r.nodeid), data_only=data_only), nothing)


cdef Py_ssize_t do_releasedir(Session s, Request r) except -2:
    return 0


serves(protocol.OPENDIR, do_opendir, 8, 0)
serves(protocol.READDIR, do_readdir, sizeof(protocol.read_in), OPEN_TO_ALL)
serves(protocol.READDIRPLUS, do_readdirplus, sizeof(protocol.read_in), OPEN_TO_ALL)
serves(protocol.FSYNCDIR, do_fsyncdir, sizeof(protocol.fsync_in), OPEN_TO_ALL)
serves(protocol.RELEASEDIR, do_releasedir, 0, UNLOCKED | OPEN_TO_ALL)
