# cython: language_level=3, annotation_typing=False
"""Requests to open, make and close files: of importance only where files are passed through."""

import os

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.answers cimport put_entry
from overlayfs_py.engines.native.extensions cimport maker
from overlayfs_py.engines.native.plain cimport stat as stat_t
from overlayfs_py.engines.native.session cimport FOREVER, OPEN_TO_ALL, Request, Session, never_ask, serves

from overlayfs_py.core.files import File
from overlayfs_py.core.ops import OPERATIONS
from overlayfs_py.core.requests import Changes


cdef Py_ssize_t do_open(Session s, Request r) except -2:
    cdef protocol.open_in* op = <protocol.open_in*>r.op
    if not s.through.on:
        return never_ask()
    how, node = op.flags, s.node(r.nodeid)

    def finish(session, Request request, file):
        try:
            return put_open(s, request.out, node, how)
        except OSError:
            OPERATIONS["release"](s.fs, file)
            raise

    in_group = r.in_group(s) if op.open_flags & protocol.OPEN_KILL_SUIDGID else None
    return s.run(r, open_steps(s, node, how, in_group), finish)


def open_steps(Session s, Node node, flags, in_group):
    if flags & os.O_TRUNC:
        changes = Changes(size=0, clear_set_ids=in_group is not None, in_group=in_group)
        yield from OPERATIONS["setattr"](s.fs, node, changes)
    return (yield from OPERATIONS["open"](s.fs, node, flags & ~os.O_TRUNC))


cdef Py_ssize_t do_create(Session s, Request r) except -2:
    cdef protocol.create_in* op = <protocol.create_in*>r.op
    cdef stat_t own
    if not s.through.on:
        return never_ask()
    name = r.entry_name()
    node = s.direct.create(r, s.node(r.nodeid), name, op.mode, op.umask, &own)
    if node is not None:
        (<Node>node).opens += 1
    else:
        node, _ = OPERATIONS["create"](s.fs, maker(s, r, op.umask), s.node(r.nodeid), name, op.mode)
    s.listings.added(r.nodeid, name)
    try:
        return put_created(s, r, node, op.flags)
    except OSError:
        # The kernel knows neither the handle nor the node: no RELEASE and no FORGET will come.
        OPERATIONS["release"](s.fs, File(node))
        OPERATIONS["forget"](s.fs, node, 0)
        raise


cdef Py_ssize_t put_created(Session s, Request r, Node node, uint32_t flags) except -2:
    cdef protocol.open_out* opened = <protocol.open_out*>(r.out + sizeof(protocol.entry_out))
    # Before the entry, whose attributes hold no longer than until somebody writes.
    cdef Py_ssize_t size = put_open(s, <char*>opened, node, flags)
    try:
        return put_entry(s, r, node) + size
    except OSError:
        s.through.release(node.id, opened.fh)
        raise


cdef Py_ssize_t put_open(Session s, char* at, Node node, uint32_t flags) except -2:
    cdef protocol.open_out* out = <protocol.open_out*>at
    memset(out, 0, sizeof(protocol.open_out))
    out.fh = s.through.open(node, flags, &out.backing_id)
    if out.backing_id:
        out.open_flags = protocol.FOPEN_PASSTHROUGH | protocol.FOPEN_NOFLUSH
    elif s.timeout == FOREVER:
        out.open_flags = protocol.FOPEN_KEEP_CACHE
    return sizeof(protocol.open_out)


cdef Py_ssize_t do_release(Session s, Request r) except -2:
    cdef uint64_t handle = (<protocol.release_in*>r.op).fh
    # 0 is that of a file which O_TMPFILE made where the kernel doesn't ask for opening.
    if handle and s.through.release(r.nodeid, handle):
        OPERATIONS["release"](s.fs, File(s.node(r.nodeid)))
    return 0


serves(protocol.OPEN, do_open, sizeof(protocol.open_in), 0)
serves(protocol.CREATE, do_create, sizeof(protocol.create_in), 0)
serves(protocol.RELEASE, do_release, sizeof(protocol.release_in), OPEN_TO_ALL)
