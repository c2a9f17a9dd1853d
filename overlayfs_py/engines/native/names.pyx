# cython: language_level=3, annotation_typing=False
"""Requests about names: looking up, making, linking, removing and renaming them, and forgetting what they led to."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp, memset

from overlayfs_py.core.nodes cimport Node
from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.answers cimport decode_device, put_absent, put_entry, put_found, put_known
from overlayfs_py.engines.native.extensions cimport maker
from overlayfs_py.engines.native.plain cimport ABSENT
from overlayfs_py.engines.native.plain cimport stat as stat_t
from overlayfs_py.engines.native.session cimport OPEN_TO_ALL, Request, Session, serves

from overlayfs_py.core.nodes import ROOT_ID
from overlayfs_py.core.ops import OPERATIONS

cdef uint64_t ROOT = ROOT_ID


cdef Py_ssize_t do_lookup(Session s, Request r) except -2:
    cdef protocol.entry_out* out = <protocol.entry_out*>r.out
    cdef stat_t own
    cdef Node parent
    if s.generations.wanted and r.size > 0 and r.data[0] == c".":
        # The kernel opens a file handle: it asks for a node it has forgotten, or for the directory of one.
        if r.size == 2 and memcmp(r.data, b".", 2) == 0:
            return s.run(r, OPERATIONS["lookup_id"](s.fs, r.nodeid), _entry)
        if r.size == 3 and memcmp(r.data, b"..", 3) == 0:
            return put_entry(s, r, OPERATIONS["lookup_parent"](s.fs, r.nodeid))
    parent = s.node(r.nodeid)
    name = r.entry_name()
    if r.nodeid == ROOT and s.beginning.leads_from_root(name):
        return put_root(s, r, parent)
    node = s.plain.entry(parent, name, &own)
    if node is ABSENT:
        return put_absent(s, out)
    if node is not None:
        return put_known(s, r, node, &own)
    try:
        node, st = OPERATIONS["lookup"](s.fs, parent, name)
    except FileNotFoundError:
        return put_absent(s, out)
    return put_found(s, r, node, st)


cdef Py_ssize_t put_root(Session s, Request r, Node root) except -2:
    """The answer that gives the kernel the root under its other id, as an entry that it doesn't remember."""
    cdef protocol.entry_out* out = <protocol.entry_out*>r.out
    s.beginning.begin_below(s.fs)
    put_entry(s, r, root)
    out.entry_valid, out.entry_valid_nsec = 0, 0
    return sizeof(protocol.entry_out)


def _entry(Session session, Request request, value):
    return put_entry(session, request, value)


cdef forget_one(Session s, uint64_t node_id, uint64_t count):
    node = s.fs.nodes.by_id.get(node_id)
    if node is not None:
        OPERATIONS["forget"](s.fs, node, min(count, <uint64_t>node.lookups))
        if node_id not in s.fs.nodes.by_id:
            s.listings.drop(node_id)


cdef Py_ssize_t do_forget(Session s, Request r) except -2:
    forget_one(s, r.nodeid, (<uint64_t*>r.op)[0])
    return 0


cdef Py_ssize_t do_batch_forget(Session s, Request r) except -2:
    cdef protocol.batch_forget_in* head = <protocol.batch_forget_in*>r.op
    cdef protocol.forget_one* one = <protocol.forget_one*>r.data
    cdef size_t index
    for index in range(min(<size_t>head.count, r.size // sizeof(protocol.forget_one))):
        forget_one(s, one[index].nodeid, one[index].nlookup)
    return 0


cdef Py_ssize_t do_mknod(Session s, Request r) except -2:
    cdef protocol.mknod_in* op = <protocol.mknod_in*>r.op
    cdef Node parent = s.node(r.nodeid)
    cdef Node node
    cdef stat_t own
    name = r.entry_name()
    node = s.direct.create(r, parent, name, op.mode, op.umask, &own)
    if node is not None:
        s.listings.added(r.nodeid, name)
        return put_known(s, r, node, &own)
    rdev = decode_device(op.rdev)
    node = OPERATIONS["mknod"](s.fs, maker(s, r, op.umask), parent, name, op.mode, rdev)
    s.listings.added(r.nodeid, name)
    return put_entry(s, r, node)


cdef Py_ssize_t do_mkdir(Session s, Request r) except -2:
    cdef protocol.mkdir_in* op = <protocol.mkdir_in*>r.op
    name = r.entry_name()
    node = OPERATIONS["mkdir"](s.fs, maker(s, r, op.umask), s.node(r.nodeid), name, op.mode)
    s.listings.added(r.nodeid, name)
    return put_entry(s, r, node)


cdef Py_ssize_t do_symlink(Session s, Request r) except -2:
    name = r.entry_name()
    target = r.name()
    node = OPERATIONS["symlink"](s.fs, maker(s, r, 0), s.node(r.nodeid), name, target)
    s.listings.added(r.nodeid, name)
    return put_entry(s, r, node)


cdef Py_ssize_t do_link(Session s, Request r) except -2:
    cdef uint64_t parent_id = r.nodeid
    name = r.entry_name()
    node = s.node((<protocol.link_in*>r.op).oldnodeid)

    def finish(session, request, value):
        s.listings.added(parent_id, name)
        return put_entry(s, request, value)

    return s.run(r, OPERATIONS["link"](s.fs, node, s.node(parent_id), name), finish)


cdef Py_ssize_t do_tmpfile(Session s, Request r) except -2:
    cdef protocol.create_in* op = <protocol.create_in*>r.op
    cdef protocol.open_out* opened
    node = OPERATIONS["tmpfile"](s.fs, maker(s, r, op.umask), s.node(r.nodeid), op.mode)
    opened = <protocol.open_out*>(r.out + put_entry(s, r, node))
    memset(opened, 0, sizeof(protocol.open_out))
    if s.through.on:
        (<Node>node).opens += 1
        opened.fh = s.through.open_cached(node)
    return sizeof(protocol.entry_out) + sizeof(protocol.open_out)


cdef Py_ssize_t remove(Session s, Request r, bint directory) except -2:
    cdef uint64_t parent_id = r.nodeid
    cdef Node parent = s.node(parent_id)
    name = r.entry_name()
    if s.direct.remove(parent, name, directory):
        s.listings.removed(parent_id, name)
        return 0

    def finish(session, request, value):
        s.listings.removed(parent_id, name)
        return 0

    return s.run(r, OPERATIONS["rmdir" if directory else "unlink"](s.fs, parent, name), finish)


cdef Py_ssize_t do_unlink(Session s, Request r) except -2:
    return remove(s, r, False)


cdef Py_ssize_t do_rmdir(Session s, Request r) except -2:
    return remove(s, r, True)


cdef Py_ssize_t rename(Session s, Request r, uint64_t new_id, uint32_t flags) except -2:
    cdef uint64_t old_id = r.nodeid
    old_name = r.entry_name()
    new_name = r.entry_name()
    if not flags and s.direct.rename(s.node(old_id), old_name, s.node(new_id), new_name):
        s.listings.removed(old_id, old_name)
        s.listings.drop(new_id)
        return 0

    def finish(session, request, value):
        if not flags & 2:  # RENAME_EXCHANGE
            s.listings.removed(old_id, old_name)
            s.listings.drop(new_id)
        return 0

    steps = OPERATIONS["rename"](s.fs, s.node(old_id), old_name, s.node(new_id), new_name, flags)
    return s.run(r, steps, finish)


cdef Py_ssize_t do_rename(Session s, Request r) except -2:
    return rename(s, r, (<protocol.rename_in*>r.op).newdir, 0)


cdef Py_ssize_t do_rename2(Session s, Request r) except -2:
    cdef protocol.rename2_in* op = <protocol.rename2_in*>r.op
    return rename(s, r, op.newdir, op.flags)


serves(protocol.LOOKUP, do_lookup, 0, 0)
serves(protocol.FORGET, do_forget, 8, OPEN_TO_ALL)
serves(protocol.BATCH_FORGET, do_batch_forget, sizeof(protocol.batch_forget_in), OPEN_TO_ALL)
serves(protocol.MKNOD, do_mknod, sizeof(protocol.mknod_in), 0)
serves(protocol.MKDIR, do_mkdir, sizeof(protocol.mkdir_in), 0)
serves(protocol.SYMLINK, do_symlink, 0, 0)
serves(protocol.LINK, do_link, sizeof(protocol.link_in), 0)
serves(protocol.TMPFILE, do_tmpfile, sizeof(protocol.create_in), 0)
serves(protocol.UNLINK, do_unlink, 0, 0)
serves(protocol.RMDIR, do_rmdir, 0, 0)
serves(protocol.RENAME, do_rename, sizeof(protocol.rename_in), 0)
serves(protocol.RENAME2, do_rename2, sizeof(protocol.rename2_in), 0)
