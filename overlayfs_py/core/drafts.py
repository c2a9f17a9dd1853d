"""Copies of small files made before they are asked for, where one file of a directory after the other is copied up.

The data of a copy has to be on disk before the copy gets its name, and for a small file that is nearly all the time it
takes: a commit of the filesystem's journal. So, once two files that were copied up each came next in their directory,
a copy takes the data of those behind it along, more of them each time that this comes true, and all are synced at once.
Such a draft has data, on disk, and no name: the copy-up of its file does all the rest, and one that nobody asks for
goes with its descriptor.
"""

from __future__ import annotations

import os
import stat

from overlayfs_py.core.nodes import Node, Real
from overlayfs_py.core.work import Staged, Work
from overlayfs_py.records import TYPE_CHECKING, NamedTuple, OrderedDict
from overlayfs_py.sys import copying, syncing

if TYPE_CHECKING:
    from overlayfs_py.core.overlay import Overlay

# Bytes of the largest file that is copied in advance.
_SMALL = 64 << 10
# How often the next file has to be the one that is copied up before any is copied in advance.
_ENOUGH = 2
_MOST_HITS = 8
# Files of a directory copied along with one: at first, and at most; and of all directories.
_FEW = 4
_MANY = 32
_IN_ALL = 48
# Who changes files in a larger directory rarely changes all of them, and to put it in order takes long.
_LARGEST = 2000


class Draft(NamedTuple):
    """The data of a lower file in a file without a name, and which file that was, at what time."""

    staged: Staged
    source: tuple[int, int, int, int, int]


class Batch:
    """What one job copies in advance: files to try, by their names in one directory, and the drafts made of them."""

    __slots__ = ("_dir_fd", "_files", "_work", "made")

    def __init__(self, work: Work, dir_fd: int, files: list[tuple[Node, bytes]]) -> None:
        self._work = work
        self._dir_fd = dir_fd
        self._files = files
        self.made: list[tuple[Node, Draft]] = []

    def copy(self) -> None:
        """Copy the small ones, until one can't be."""
        for node, name in self._files:
            try:
                draft = self._draft(name)
            except OSError:
                # gone, unreadable, or no room for it: whoever asks for its copy is told
                return
            if draft is not None:
                self.made.append((node, draft))

    def _draft(self, name: bytes) -> Draft | None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        source = os.open(name, flags, dir_fd=self._dir_fd)
        try:
            st = os.fstat(source)
            if not _is_small(st):
                return None
            staged = self._work.stage_file(0o600)
            try:
                copying.copy_at_once(source, staged.fd, st.st_size)
                syncing.begin(staged.fd)
            except OSError:
                staged.close()
                raise
            return Draft(staged, _identity(st))
        finally:
            os.close(source)

    def keep_synced(self, errors: list[OSError | None]) -> None:
        """Give up the drafts that could not be synced; `errors` has one answer for each."""
        made, self.made = self.made, []
        for (node, draft), error in zip(made, errors, strict=True):
            if error is None:
                self.made.append((node, draft))
            else:
                # whoever asks for its copy is told
                draft.staged.close()

    def close(self) -> None:
        """Let go of all that nobody has taken."""
        os.close(self._dir_fd)
        for _, draft in self.made:
            draft.staged.close()
        self.made = []


class Drafts:
    """The drafts of one overlay, and what tells which are worth having."""

    __slots__ = ("_at", "_expected", "_hits", "_order", "_parent", "_syncs", "_under_way", "_window", "fs", "ready")

    def __init__(self, fs: Overlay) -> None:
        self.fs = fs
        self.ready: OrderedDict[Node, Draft] = OrderedDict()
        # The directory that is gone through, its files, and the first of them that nobody has come to.
        self._parent: Node | None = None
        self._order: list[Node] = []
        self._at = 0
        self._expected: Node | None = None
        self._hits = 0
        self._window = _FEW
        self._syncs: syncing.Syncs | None = None
        self._under_way = False

    def take(self, node: Node, st: os.stat_result) -> Staged | None:
        """The draft of a file whose attributes are `st`, for the caller to close; None where there is none."""
        draft = self.ready.pop(node, None)
        if draft is None:
            return None
        if draft.source != _identity(st):
            draft.staged.close()
            return None
        self._hits = min(self._hits + 1, _MOST_HITS)
        self._window = min(2 * self._window, _MANY)
        return draft.staged

    def begin(self, node: Node, real: Real) -> Batch | None:
        """Note that a small file is being copied up from `real`; what is to be copied along with it, None for nothing.

        The caller gives it back by end(), and begins no other one before.
        """
        work = self.fs.work
        if self._under_way or work is None or not work.tmpfiles or not self._follow(node) or self._hits < _ENOUGH:
            return None
        files: list[tuple[Node, bytes]] = []
        while len(files) < self._window and self._at < len(self._order):
            other = self._order[self._at]
            self._at += 1
            below = other.below
            if _is_lower(other) and isinstance(below, Real) and below.parent is real.parent:
                files.append((other, below.name))
        self._expected = self._order[self._at] if self._at < len(self._order) else None
        if not files or real.parent is None:
            return None
        try:
            dir_fd = os.dup(self.fs.dirs.fd(real.parent))
        except OSError:
            # no descriptor to be had, or the directory is gone: the copy itself tells
            return None
        self._under_way = True
        return Batch(work, dir_fd, files)

    def _follow(self, node: Node) -> bool:
        """Find a file's place in its directory; False where it has none."""
        parent = node.parent
        if node.removed or parent is None or parent.children is None:
            return False
        if node is self._expected:
            self._hits = min(self._hits + 1, _MOST_HITS)
        if self._parent is not parent or self._at >= len(self._order) or self._order[self._at] is not node:
            known = parent is self._parent
            children = parent.children.values() if len(parent.children) <= _LARGEST else ()
            self._order = [child for child in children if child.kind == stat.S_IFREG]
            self._parent = parent
            try:
                self._at = self._order.index(node)
            except ValueError:
                self._at = len(self._order)
                return False
            if node is not self._expected and (known or self._at > 0):
                # Somebody picks files.
                self._miss()
        self._at += 1
        self._expected = self._order[self._at] if self._at < len(self._order) else None
        return True

    def _miss(self) -> None:
        self._hits //= 2
        self._window = _FEW

    def sync(self, batch: Batch, fd: int) -> None:
        """Sync a copy and the drafts made along with it; raises what keeps the copy from it."""
        if self._syncs is None:
            self._syncs = syncing.Syncs(1 + _MANY)
        error, *errors = self._syncs.sync([fd, *(draft.staged.fd for _, draft in batch.made)])
        batch.keep_synced(errors)
        if error is not None:
            raise error

    def end(self, batch: Batch, *, done: bool) -> None:
        """Keep what a batch has made, if it is `done`: on disk."""
        self._under_way = False
        made = batch.made
        if done:
            batch.made = []
        batch.close()
        if not done:
            return
        for node, draft in made:
            if not _is_lower(node) or node in self.ready:
                draft.staged.close()
                continue
            self.ready[node] = draft
        while len(self.ready) > _IN_ALL:
            _, draft = self.ready.popitem(last=False)
            draft.staged.close()
            self._miss()

    def close(self) -> None:
        for draft in self.ready.values():
            draft.staged.close()
        self.ready.clear()
        if self._syncs is not None:
            self._syncs.close()
            self._syncs = None


def _is_small(st: os.stat_result) -> bool:
    """Whether a file is a regular one of a few bytes without holes."""
    return stat.S_ISREG(st.st_mode) and 0 < st.st_size <= min(_SMALL, st.st_blocks * 512)


def _is_lower(node: Node) -> bool:
    """Whether a file's data is all that of one lower file."""
    return node.upper is None and node.pinned < 0 and not node.removed and not node.metacopy


def _identity(st: os.stat_result) -> tuple[int, int, int, int, int]:
    return st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns
