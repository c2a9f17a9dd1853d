"""The portable engine: pyfuse3 and trio, on any kernel.

Everything runs in trio's one thread, so the event loop is the lock that core/ asks for; only the jobs that operations
hand out run in worker threads. What pyfuse3 can't pass on is listed in UNSUPPORTED.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import pyfuse3
import trio

from overlayfs_py.config import MountConfig
from overlayfs_py.core import files, readdir
from overlayfs_py.core.attrs import acl_clears_sgid
from overlayfs_py.core.nodes import Node
from overlayfs_py.core.objects import attr
from overlayfs_py.core.ops import OPERATIONS
from overlayfs_py.core.overlay import Overlay
from overlayfs_py.core.requests import Attr, Caller, Changes, Job, Steps
from overlayfs_py.engines.beginning import Beginning
from overlayfs_py.journal import Journal
from overlayfs_py.sys.descriptors import is_cut_off

log = Journal(__name__)

UNSUPPORTED = frozenset(
    {
        *("lookup_id", "lookup_parent", "tmpfile", "fallocate", "lseek", "copy_file_range", "syncfs"),
        *("get_flags", "set_flags"),
    }
)
"""Rows of core.ops.OPERATIONS that pyfuse3 has no handlers for: the kernel answers EOPNOTSUPP, or does without."""

Result = TypeVar("Result")
Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])

# Below this, and above what inode numbers reach before they fill 63 bits.
_BROKEN_IDS = 1 << 63

_SPECIAL_ENTRIES = 2  # "." and ".."


def _answers(handler: Handler) -> Handler:
    """Turn what a handler raises into an answer; nothing that happens in a request may end the daemon."""

    @wraps(handler)
    async def answer(self: Portable, *args: Any) -> Any:
        try:
            return await handler(self, *args)
        except OSError as error:
            number = error.errno or errno.EIO
            # The kernel takes ENOSYS for "never ask again".
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP if number == errno.ENOSYS else number) from None
        except pyfuse3.FUSEError:
            raise
        except Exception:
            log.exception("unexpected error in %s%r: EIO answered", handler.__name__, args)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return answer  # type: ignore[return-value]


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid, ctx.umask)


class Portable(pyfuse3.Operations):
    """One mount's requests, each handed to the operation of its name."""

    supports_dot_lookup = False

    def __init__(self, fs: Overlay, fuse_fd: int) -> None:
        super().__init__()
        self.fs = fs
        self.fuse_fd = fuse_fd
        self.enable_writeback_cache = fs.config.writeback
        self.enable_acl = not fs.config.noacl and not fs.config.noxattrs
        self.handles: dict[int, Any] = {}
        self.last_handle = 0
        self.last_broken = _BROKEN_IDS
        self.running: dict[Job, trio.Event] = {}

    # What operations need of an engine.

    async def _run(self, steps: Steps[Result]) -> Result:
        """Run an operation to its end, its jobs in worker threads."""
        try:
            while True:
                await self._execute(next(steps))
        except StopIteration as stop:
            value: Result = stop.value
            return value

    async def _execute(self, job: Job) -> None:
        done = self.running.get(job)
        if done is not None:
            await done.wait()
            return
        if job.finished:
            return
        done = self.running[job] = trio.Event()
        job.unwanted = lambda: is_cut_off(self.fuse_fd)
        try:
            await trio.to_thread.run_sync(job.execute)
        finally:
            del self.running[job]
            # Whoever waits goes on after the operation that began the job, which has the result to commit.
            done.set()

    def _new_handle(self, opened: Any) -> int:
        self.last_handle += 1
        self.handles[self.last_handle] = opened
        return self.last_handle

    def _attributes(self, shown: Attr) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = shown.ino
        entry.st_mode = shown.mode
        entry.st_nlink = shown.nlink
        entry.st_uid = shown.uid
        entry.st_gid = shown.gid
        entry.st_rdev = shown.rdev
        entry.st_size = shown.size
        entry.st_blocks = shown.blocks
        entry.st_blksize = shown.blksize
        entry.st_atime_ns = shown.atime_ns
        entry.st_mtime_ns = shown.mtime_ns
        entry.st_ctime_ns = shown.ctime_ns
        entry.entry_timeout = entry.attr_timeout = self.fs.config.timeout
        return entry

    def _shown(self, node: Node, st: os.stat_result | None) -> pyfuse3.EntryAttributes:
        """The attributes of a node that the kernel may get a reference to; it gets none where they can't be read."""
        try:
            return self._attributes(attr(self.fs, node, st))
        except OSError:
            # No FORGET will come.
            OPERATIONS["forget"](self.fs, node, 0)
            raise

    def _entry(self, node: Node, st: os.stat_result | None = None) -> pyfuse3.EntryAttributes:
        """The answer that gives the kernel a reference to `node`."""
        entry = self._shown(node, st)
        node.lookups += 1
        return entry

    # Names.

    @_answers
    async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        try:
            node, st = OPERATIONS["lookup"](self.fs, self.fs.node(parent), name)
        except FileNotFoundError:
            missing = pyfuse3.EntryAttributes()
            missing.st_ino = 0
            missing.entry_timeout = self.fs.config.timeout
            return missing
        return self._entry(node, st)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for node_id, count in inode_list:
            node = self.fs.nodes.by_id.get(node_id)
            if node is not None:
                OPERATIONS["forget"](self.fs, node, count)

    @_answers
    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry(OPERATIONS["mknod"](self.fs, _caller(ctx), self.fs.node(parent), name, mode, rdev))

    @_answers
    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(OPERATIONS["mkdir"](self.fs, _caller(ctx), self.fs.node(parent), name, mode))

    @_answers
    async def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry(OPERATIONS["symlink"](self.fs, _caller(ctx), self.fs.node(parent), name, target))

    @_answers
    async def link(
        self, node_id: int, parent: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        steps = OPERATIONS["link"](self.fs, self.fs.node(node_id), self.fs.node(parent), name)
        return self._entry(await self._run(steps))

    @_answers
    async def unlink(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._run(OPERATIONS["unlink"](self.fs, self.fs.node(parent), name))

    @_answers
    async def rmdir(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._run(OPERATIONS["rmdir"](self.fs, self.fs.node(parent), name))

    @_answers
    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: pyfuse3.RequestContext
    ) -> None:
        source, target = self.fs.node(parent), self.fs.node(new_parent)
        await self._run(OPERATIONS["rename"](self.fs, source, name, target, new_name, flags))

    # Attributes.

    @_answers
    async def getattr(self, node_id: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(OPERATIONS["getattr"](self.fs, self.fs.node(node_id)))

    @_answers
    async def setattr(
        self,
        node_id: int,
        wanted: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        changes = Changes(
            stat.S_IMODE(wanted.st_mode) if fields.update_mode else None,
            wanted.st_uid if fields.update_uid else None,
            wanted.st_gid if fields.update_gid else None,
            wanted.st_size if fields.update_size else None,
            wanted.st_atime_ns if fields.update_atime else None,
            wanted.st_mtime_ns if fields.update_mtime else None,
        )
        return self._attributes(await self._run(OPERATIONS["setattr"](self.fs, self.fs.node(node_id), changes)))

    @_answers
    async def readlink(self, node_id: int, ctx: pyfuse3.RequestContext) -> bytes:
        target: bytes = OPERATIONS["readlink"](self.fs, self.fs.node(node_id))
        return target

    @_answers
    async def getxattr(self, node_id: int, key: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        self._need_xattrs()
        value: bytes = OPERATIONS["getxattr"](self.fs, self.fs.node(node_id), key)
        return value

    @_answers
    async def listxattr(self, node_id: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        self._need_xattrs()
        keys: list[bytes] = OPERATIONS["listxattr"](self.fs, self.fs.node(node_id), trusted=ctx.uid == 0)
        return keys

    @_answers
    async def setxattr(self, node_id: int, key: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        # pyfuse3 obeys XATTR_CREATE and XATTR_REPLACE itself, by asking getxattr first.
        self._need_xattrs()
        node = self.fs.node(node_id)
        clear_sgid = acl_clears_sgid(self.fs, _caller(ctx), node, key)
        await self._run(OPERATIONS["setxattr"](self.fs, node, key, value, clear_sgid=clear_sgid))

    @_answers
    async def removexattr(self, node_id: int, key: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._need_xattrs()
        await self._run(OPERATIONS["removexattr"](self.fs, self.fs.node(node_id), key))

    def _need_xattrs(self) -> None:
        if self.fs.config.noxattrs:
            # The kernel then stops asking for them at all.
            raise pyfuse3.FUSEError(errno.ENOSYS)

    @_answers
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        found = OPERATIONS["statfs"](self.fs)
        answer = pyfuse3.StatvfsData()
        for field in (
            "f_bsize",
            "f_frsize",
            "f_blocks",
            "f_bfree",
            "f_bavail",
            "f_files",
            "f_ffree",
            "f_favail",
            "f_namemax",
        ):
            setattr(answer, field, getattr(found, field))
        return answer

    # Files.

    @_answers
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        node, opened = OPERATIONS["create"](self.fs, _caller(ctx), self.fs.node(parent), name, mode)
        try:
            entry = self._entry(node)
        except OSError:
            # The kernel knows neither the handle nor the node: no RELEASE and no FORGET will come.
            OPERATIONS["release"](self.fs, opened)
            OPERATIONS["forget"](self.fs, node, 0)
            raise
        return self._file_info(opened), entry

    @_answers
    async def open(self, node_id: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        node = self.fs.node(node_id)
        opened = await self._run(OPERATIONS["open"](self.fs, node, flags))
        if flags & os.O_TRUNC and ctx.uid != 0:
            # The kernel takes set-id bits itself, except where it is the opening that truncates.
            files.take_set_ids(self.fs, self.fs.files.fd(node, write=True))
            pyfuse3.invalidate_inode(node.id, attr_only=True)
        return self._file_info(opened)

    def _file_info(self, opened: files.File) -> pyfuse3.FileInfo:
        # Nobody but this mount changes its layers, so what the kernel has cached stays true.
        return pyfuse3.FileInfo(fh=self._new_handle(opened), keep_cache=True)

    @_answers
    async def read(self, fh: int, offset: int, size: int) -> bytes:
        data: bytes = OPERATIONS["read"](self.fs, self.handles[fh], offset, size)
        return data

    @_answers
    async def write(self, fh: int, offset: int, data: bytes) -> int:
        written: int = OPERATIONS["write"](self.fs, self.handles[fh], offset, data)
        return written

    async def flush(self, fh: int) -> None:
        # Every write is with the layer's filesystem already; the kernel then stops asking.
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @_answers
    async def release(self, fh: int) -> None:
        OPERATIONS["release"](self.fs, self.handles.pop(fh))

    @_answers
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._run(OPERATIONS["fsync"](self.fs, self.handles[fh].node, data_only=datasync))

    # Directories.

    @_answers
    async def opendir(self, node_id: int, ctx: pyfuse3.RequestContext) -> int:
        return self._new_handle(OPERATIONS["opendir"](self.fs, self.fs.node(node_id)))

    @_answers
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        opened = self.handles[fh]
        names = OPERATIONS["readdir"](self.fs, opened, start_id)
        for position in range(start_id, len(names) + _SPECIAL_ENTRIES):
            if position < _SPECIAL_ENTRIES:
                node = opened.node if position == 0 else opened.node.parent or opened.node
                name = b".." if position else b"."
                entry = self._attributes(attr(self.fs, node))
            else:
                name = names[position - _SPECIAL_ENTRIES]
                try:
                    node, st = OPERATIONS["lookup"](self.fs, opened.node, name)
                    entry = self._shown(node, st)
                except FileNotFoundError:
                    # gone since the listing was taken
                    continue
                except OSError:
                    # This name alone is broken: it is listed, and whoever uses it gets the error.
                    if not pyfuse3.readdir_reply(token, name, self._broken(opened.node, name), position + 1):
                        break
                    continue
            if not pyfuse3.readdir_reply(token, name, entry, position + 1):
                # What the kernel gets no reference to doesn't stay for its sake.
                OPERATIONS["forget"](self.fs, node, 0)
                break
            # The kernel takes a reference for each entry it received, but for these two.
            if position >= _SPECIAL_ENTRIES:
                node.lookups += 1

    def _broken(self, parent: Node, name: bytes) -> pyfuse3.EntryAttributes:
        """An entry for a name that can't be looked up: its id is nobody's, and the kernel asks again before use."""
        self.last_broken -= 1
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = self.last_broken
        entry.st_mode = readdir.kind_of(self.fs, parent, name) or stat.S_IFREG
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    @_answers
    async def releasedir(self, fh: int) -> None:
        OPERATIONS["releasedir"](self.fs, self.handles.pop(fh))

    @_answers
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._run(OPERATIONS["fsyncdir"](self.fs, self.handles[fh].node, data_only=datasync))

    async def access(self, node_id: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        # The kernel decides (default_permissions) and doesn't ask.
        return True


def root_name(config: MountConfig) -> bytes:
    """The name in the root at which the mount is to begin: none, it is the root."""
    return b""


def serve(overlay: Overlay, fuse_fd: int, beginning: Beginning) -> None:
    """Serve the mounted connection `fuse_fd`, whose tree begins at its root, until it is unmounted; then close the
    overlay.

    Takes over the descriptor. Signals, and unmounting, are the caller's business.
    """
    os.umask(0)
    # The kernel knows no allow_root: libfuse turns others away where the mount lets everybody in.
    options = {"allow_root"} if overlay.config.allow_root else set()
    pyfuse3.init(Portable(overlay, fuse_fd), f"/dev/fd/{fuse_fd}", options)
    try:
        trio.run(pyfuse3.main)
    except* ConnectionAbortedError:
        # unmounted while a request was just being handed over (fuse_dev_do_read): pyfuse3 expects ENODEV alone
        log.debug("unmounted with requests on their way")
    finally:
        pyfuse3.close(unmount=False)
        overlay.close()
