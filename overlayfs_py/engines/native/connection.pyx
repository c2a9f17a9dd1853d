# cython: language_level=3, annotation_typing=False
"""The beginning and the end of the connection: what the kernel offers, and what of it is used."""

import errno
import os

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from overlayfs_py.engines.native cimport protocol
from overlayfs_py.engines.native.session cimport FOREVER, OPEN_TO_ALL, Request, Session, serves

from overlayfs_py.engines import machine

_PAGE = os.sysconf("SC_PAGE_SIZE")

# Beyond what fits into an enumeration.
cdef uint64_t SECURITY_CTX = (<uint64_t>1) << 32
cdef uint64_t PASSTHROUGH = (<uint64_t>1) << 37
cdef uint64_t NO_EXPORT_SUPPORT = (<uint64_t>1) << 38
cdef uint64_t ALLOW_IDMAP = (<uint64_t>1) << 40
cdef uint64_t OVER_IO_URING = (<uint64_t>1) << 41
cdef uint64_t REQUEST_TIMEOUT = (<uint64_t>1) << 42


cdef Py_ssize_t do_init(Session s, Request r) except -2:
    cdef protocol.init_in* op = <protocol.init_in*>r.op
    cdef protocol.init_out* out = <protocol.init_out*>r.out
    cdef uint64_t offered = op.flags
    cdef uint64_t wanted = (
        protocol.ASYNC_READ
        | protocol.BIG_WRITES
        | protocol.DONT_MASK
        | protocol.HAS_IOCTL_DIR
        | protocol.DO_READDIRPLUS
        | protocol.ASYNC_DIO
        | protocol.NO_OPENDIR_SUPPORT
        | protocol.PARALLEL_DIROPS
        | protocol.MAX_PAGES
        | protocol.CACHE_SYMLINKS
        | protocol.HANDLE_KILLPRIV_V2
        | protocol.SETXATTR_EXT
        | protocol.INIT_EXT
    )
    if op.major != protocol.KERNEL_VERSION or op.minor < protocol.OLDEST_MINOR_VERSION:
        raise OSError(errno.EPROTO, "a kernel too old")
    if op.flags & protocol.INIT_EXT:
        offered |= (<uint64_t>op.flags2) << 32
    if not s.fs.config.noacl and not s.fs.config.noxattrs:
        wanted |= protocol.POSIX_ACL
    # The kernel checks access by the ids that a mount shows, and tells whose they are only to who makes something.
    if s.fs.config.default_permissions and not s.only_root:
        wanted |= ALLOW_IDMAP
    wanted |= protocol.EXPORT_SUPPORT if s.generations.wanted else NO_EXPORT_SUPPORT
    # By default not: under it the kernel asks for the bare names of every other piece of a big directory, and then for
    # each of them, which costs a walk a quarter more than the attributes cost a listing that needs none.
    if s.fs.config.readdirplus == "auto":
        wanted |= protocol.READDIRPLUS_AUTO
    if s.fs.config.security_label:
        wanted |= SECURITY_CTX
    # The kernel looks at its switch once more when it has the answer.
    if s.want_uring and machine.uring_switch() is not False:
        wanted |= OVER_IO_URING
    if s.fs.config.io == "passthrough":
        wanted |= PASSTHROUGH | protocol.ATOMIC_O_TRUNC
    else:
        wanted |= protocol.NO_OPEN_SUPPORT
    if s.fs.config.request_timeout:
        wanted |= REQUEST_TIMEOUT
    # What the kernel has cached of a file stays true, unless it is to look whether layers change.
    wanted |= protocol.EXPLICIT_INVAL_DATA if s.timeout == FOREVER else protocol.AUTO_INVAL_DATA
    if s.fs.config.writeback:
        wanted |= protocol.WRITEBACK_CACHE
    wanted &= offered
    memset(out, 0, sizeof(protocol.init_out))
    out.major = protocol.KERNEL_VERSION
    out.minor = min(op.minor, <uint32_t>protocol.KERNEL_MINOR_VERSION)
    out.max_readahead = op.max_readahead
    out.flags = <uint32_t>wanted
    out.flags2 = <uint32_t>(wanted >> 32)
    out.max_background = 64
    out.congestion_threshold = 48
    out.max_write = s.max_write
    out.max_pages = s.payload // _PAGE
    out.time_gran = 1
    # One level, so that the kernel's overlayfs can still use this mount as a layer.
    out.max_stack_depth = 1 if wanted & PASSTHROUGH else 0
    out.request_timeout = s.fs.config.request_timeout if wanted & REQUEST_TIMEOUT else 0
    s.through.on = bool(wanted & PASSTHROUGH)
    s.long_setxattr = bool(wanted & protocol.SETXATTR_EXT)
    s.security_label = bool(wanted & SECURITY_CTX)
    s.minor = out.minor
    s.uring = bool(wanted & OVER_IO_URING)
    return sizeof(protocol.init_out)


cdef Py_ssize_t do_destroy(Session s, Request r) except -2:
    return 0


serves(protocol.INIT, do_init, sizeof(protocol.init_in), OPEN_TO_ALL)
serves(protocol.DESTROY, do_destroy, 0, OPEN_TO_ALL)
