"""Copies of small files made before they are asked for, where one file of a directory after the other is copied up.

The data of a copy has to be on disk before the copy gets its name, and for a small file that is nearly all the time it
takes: a commit of the filesystem's journal. So, once two files that were copied up each came next in their directory,
a copy takes the data of those behind it along, more of them each time that this comes true, and all are synced at once.
Such a draft has data, on disk, and no name: the copy-up of its file does all the rest, and one that nobody asks for
goes with its descriptor. Nothing of the kind is done where nothing is synced, as where blocks are shared.
"""

from __future__ import annotations

import os
import stat

from overlayfs_py.core.nodes import Node, Real
from overlayfs_py.core.work import Staged, Work
from overlayfs_py.records import TYPE_CHECKING, NamedTuple, OrderedDict
from overlayfs_py.sys import copying, syncing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from overlayfs_py.core.overlay import Overlay

# How often the next file has to be the one that is copied up before any is copied in advance.
_ENOUGH = 2
_MOST_HITS = 8
# Files of a directory copied along with one: at first, and at most; and of all directories.
_FEW = 4
_MANY = 32
_IN_ALL = 48
# A larger directory is put in order only where one file after the other has been copied up so far, as that takes long.
_LARGE = 2000
# Bytes and inodes that must be free, so that what nobody asks for takes no room from others.
_FREE_BYTES = 64 << 20
_FREE_INODES = 1024

MOST_OPEN = _IN_ALL + _MANY + 2
"""Descriptors open for drafts at any time: those kept, and those being made, with their directory and one source."""


class Draft(NamedTuple):
    """The data of a lower file in a file without a name, and which file that was, at what time."""

    staged: Staged
    source: tuple[int, int, int, int, int]


class Batch:
    """What one job copies in advance: files to try, by their names in one directory, and the drafts made of them."""

    __slots__ = ("_dir_fd", "_files", "_syncs", "_work", "made")

    def __init__(self, work: Work, syncs: syncing.Syncs, dir_fd: int, files: list[tuple[Node, bytes]]) -> None:
        self._work = work
        self._syncs = syncs
        self._dir_fd = dir_fd
        self._files = files
        self.made: list[tuple[Node, Draft]] = []

    def run(self, target: int) -> None:
        """Sync a copy, the descriptor `target`, and the drafts made along with it, of which those stay that could be.

        Raises what keeps the copy from it.
        """
        syncing.begin(target)
        self._copy()
        made, self.made = self.made, []
        error, *errors = self._syncs.sync([target, *(draft.staged.fd for _, draft in made)])
        for (node, draft), failed in zip(made, errors, strict=True):
            if failed is None:
                self.made.append((node, draft))
            else:
                # whoever asks for its copy is told
                draft.staged.close()
        if error is not None:
            raise error

    def _copy(self) -> None:
        """Copy the small ones, until one can't be."""
        try:
            if not self._has_room():
                return
            for node, name in self._files:
                draft = self._draft(name)
                if draft is not None:
                    self.made.append((node, draft))
        except (OSError, MemoryError):
            # gone, unreadable, not the daemon's own, or no room for it: whoever asks for its copy is told
            return

    def _has_room(self) -> bool:
        free = os.fstatvfs(self._work.fd)
        return free.f_bavail * free.f_frsize >= _FREE_BYTES and (not free.f_files or free.f_favail >= _FREE_INODES)

    def _draft(self, name: bytes) -> Draft | None:
        # The access time is copied, too, and reading for a draft is no access.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOATIME | os.O_CLOEXEC
        source = os.open(name, flags, dir_fd=self._dir_fd)
        try:
            st = os.fstat(source)
            if not stat.S_ISREG(st.st_mode) or not copying.goes_at_once(st.st_size, st):
                return None
            staged = self._work.stage_file(0o600)
            copied = False
            try:
                copying.copy_at_once(source, staged.fd, st.st_size)
                copied = True
            finally:
                if not copied:
                    staged.close()
            syncing.begin(staged.fd)
            return Draft(staged, _identity(st))
        finally:
            os.close(source)

    def close(self) -> None:
        os.close(self._dir_fd)


class Drafts:
    """The drafts of one overlay, and what tells which are worth having."""

    __slots__ = ("_at", "_hits", "_order", "_parent", "_syncs", "_tried", "_under_way", "_window", "fs", "ready")

    def __init__(self, fs: Overlay) -> None:
        self.fs = fs
        self.ready: OrderedDict[Node, Draft] = OrderedDict()
        # The directory that is gone through, its files, the first of them that is still to come, and the first of those
        # before it that were to be copied in advance.
        self._parent: Node | None = None
        self._order: Sequence[Node] = ()
        self._at = 0
        self._tried = 0
        self._hits = 0
        self._window = _FEW
        self._syncs: syncing.Syncs | None = None
        self._under_way = False

    def take(self, node: Node, real: Real, st: os.stat_result) -> Staged | None:
        """Note that a file is being copied up from `real`, whose attributes are `st`.

        The answer is its draft, for the caller to close; None where there is none.
        """
        if not self.fs.sync or real.layer not in self.fs.unshared:
            return None
        draft = self.ready.pop(node, None)
        if draft is None:
            self._find(node)
            return None
        if draft.source != _identity(st):
            draft.staged.close()
            return None
        self._hits = min(self._hits + 1, _MOST_HITS)
        self._window = min(2 * self._window, _MANY)
        return draft.staged

    def _find(self, node: Node) -> None:
        """Find the place of a file without a draft in its directory."""
        parent = node.parent
        if node.removed or parent is None or parent.children is None:
            return
        known = parent is self._parent
        while known and self._at < len(self._order) and self._order[self._at].upper is not None:
            # copied up before
            self._at += 1
        if known and self._at < len(self._order) and self._order[self._at] is node:
            self._hits = min(self._hits + 1, _MOST_HITS)
        elif known and node in self._order[self._tried : self._at]:
            # It is too large to be copied in advance, or could not be.
            return
        else:
            in_order = len(parent.children) <= _LARGE or self._hits >= _ENOUGH
            children = parent.children.values() if in_order else ()
            self._parent, self._order = parent, [child for child in children if child.kind == stat.S_IFREG]
            self._at = self._order.index(node) if node in self._order else len(self._order)
            if known or self._at > 0:
                # Somebody picks files.
                self._miss()
        self._at += 1
        self._tried = self._at

    def _miss(self) -> None:
        self._hits //= 2
        self._window = _FEW

    def begin(self, node: Node, real: Real) -> Batch | None:
        """What is to be copied along with a small file that is being copied up from `real`; None for nothing.

        The caller gives it back by end(), and there is no other one before.
        """
        work, parent = self.fs.work, node.parent
        if (
            not self.fs.sync
            or self._under_way
            or self._hits < _ENOUGH
            or work is None
            or not work.tmpfiles
            or parent is None
            or parent is not self._parent
            or real.parent is None
        ):
            return None
        files: list[tuple[Node, bytes]] = []
        self._tried = self._at
        while len(files) < self._window and self._at < len(self._order):
            other = self._order[self._at]
            self._at += 1
            below = other.below
            if self._is_wanted(other, parent) and isinstance(below, Real) and below.parent is real.parent:
                files.append((other, below.name))
        if not files:
            return None
        try:
            dir_fd = os.dup(self.fs.dirs.fd(real.parent))
        except OSError:
            # no descriptor to be had, or the directory is gone: the copy itself tells
            return None
        if self._syncs is None:
            self._syncs = syncing.Syncs(1 + _MANY)
        self._under_way = True
        return Batch(work, self._syncs, dir_fd, files)

    def _is_wanted(self, node: Node, parent: Node) -> bool:
        """Whether a file of a directory, as the kernel knows it, has its data in lower layers alone, and no draft."""
        return (
            node.upper is None
            and node.pinned < 0
            and not node.metacopy
            and (parent.children or {}).get(node.name) is node
            and node not in self.ready
        )

    def end(self, batch: Batch, *, done: bool) -> None:
        """Keep what a batch has made, if it is `done`: on disk."""
        self._under_way = False
        batch.close()
        for node, draft in batch.made:
            if done and node.parent is not None and self._is_wanted(node, node.parent):
                self.ready[node] = draft
            else:
                self._let_go(draft)
        while len(self.ready) > _IN_ALL:
            self._let_go(self.ready.popitem(last=False)[1])
            self._miss()

    def drop(self, node: Node) -> None:
        """Let go of the draft of a file that has been removed, or that nobody refers to."""
        draft = self.ready.pop(node, None) if self.ready else None
        if draft is not None:
            self._let_go(draft)

    def _let_go(self, draft: Draft) -> None:
        self.fs.close_later(draft.staged.detach())

    def close(self) -> None:
        for draft in self.ready.values():
            draft.staged.close()
        self.ready.clear()
        if self._syncs is not None:
            self._syncs.close()
            self._syncs = None


def _identity(st: os.stat_result) -> tuple[int, int, int, int, int]:
    return st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns
