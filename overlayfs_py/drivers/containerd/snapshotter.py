"""Snapshots: a row of metadata and a directory each, and the mounts that show them.

ROOT/metadata.db                what is known of them
ROOT/snapshots/NUMBER/fs        the layer: what the snapshot adds to its parents
ROOT/snapshots/NUMBER/work      the work directory of its mount, until it is committed
ROOT/snapshots/removed-*        on the way out
ROOT/empty                      a lower layer for a snapshot that has no parent

A directory is made before its row is kept and goes after its row is gone, so that a crash leaves at worst a directory
without a row, which `cleanup` removes. Numbers are never used again once a row was kept.
"""

import logging
import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from overlayfs_py.drivers.containerd.failures import FailedPreconditionError, InvalidArgumentError
from overlayfs_py.drivers.containerd.filters import parse_all
from overlayfs_py.drivers.containerd.metadata import Kind, Metadata, Snapshot
from overlayfs_py.drivers.containerd.usage import Usage, measure
from overlayfs_py.errors import ConfigError
from overlayfs_py.sys.credentials import in_initial_user_namespace
from overlayfs_py.sys.locking import try_lock_dir

OVERLAY = "fuse3.overlayfs-py"
"""The type of mounts: containerd calls mount.fuse3 for it, which calls `overlayfs-py`."""

MAPPINGS = {"containerd.io/snapshot/uidmapping": "uidmapping", "containerd.io/snapshot/gidmapping": "gidmapping"}
"""Labels with ranges of ids, CONTAINER:HOST:COUNT split by commas, and the mount options they become."""

UNPACKED = "overlay"
"""The type of the mount of a layer that is being unpacked. containerd does not make this mount: it writes to the upper
layer, in the kernel's format, which is ours. That takes half the time."""

_UNPACKING = re.compile(r"(?:.*/)?extract-[^/ ]+ [^/ ]+")
"""Keys under which containerd unpacks layers (UnpackKeyFormat of its package snapshots), behind those of namespaces."""

_RANGES = re.compile(r"\d+:\d+:\d+(?:,\d+:\d+:\d+)*")
_REMOVED = "removed-"
# mount.fuse3 hands its options to a shell, and colons and commas split them.
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9_./@%+=-]*")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount to make, as mount(8) takes it."""

    type: str
    source: str
    options: Sequence[str]


class Snapshotter:
    """All snapshots below one directory, which it alone uses. Its methods may be called by several threads.

    They raise SnapshotError, and OSError or sqlite3.Error when the disk fails.
    """

    __slots__ = ("_initial", "_lock", "_metadata", "_root", "_root_fd", "_snapshots")

    def __init__(self, root: str) -> None:
        """Open the directory, making it if it is not there. Raises ConfigError, OSError, sqlite3.Error."""
        self._root = os.path.abspath(root)
        if _PLAIN_PATH.fullmatch(self._root) is None:
            raise ConfigError(f"the root {self._root!r} has characters that mount options can't carry")
        self._snapshots = os.path.join(self._root, "snapshots")
        os.makedirs(self._root, mode=0o700, exist_ok=True)
        self._root_fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not try_lock_dir(self._root_fd):
                raise ConfigError(f"another snapshotter uses {self._root}")
            os.makedirs(self._snapshots, mode=0o700, exist_ok=True)
            os.makedirs(os.path.join(self._root, "empty"), mode=0o755, exist_ok=True)
            self._metadata = Metadata(os.path.join(self._root, "metadata.db"))
        except BaseException:
            os.close(self._root_fd)
            raise
        self._lock = threading.Lock()
        # In any other user namespace, where no whiteout can be made, containerd mounts what it unpacks to.
        self._initial = in_initial_user_namespace()

    def close(self) -> None:
        """Let go of the directory."""
        with self._lock:
            self._metadata.close()
            os.close(self._root_fd)

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Make an active snapshot, to be written to."""
        return self._create(Kind.ACTIVE, key, parent, labels)

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Make a snapshot to be read only."""
        return self._create(Kind.VIEW, key, parent, labels)

    def mounts(self, key: str) -> list[Mount]:
        """What shows a snapshot that is not committed."""
        with self._lock:
            snapshot = self._metadata.get(key)
            if snapshot.kind == Kind.COMMITTED:
                raise FailedPreconditionError(f"the snapshot {key!r} is committed; make a view of it to mount it")
            return self._mounts(snapshot, self._metadata.ancestors(snapshot))

    def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Make an active snapshot a layer that others can be built on."""
        usage = self.usage(key)
        with self._lock:
            with self._metadata.transaction():
                number = self._metadata.commit(name, key, usage, labels)
            try:
                aside = self._put_work_aside(number)
            except OSError as error:
                log.warning("the work directory of the committed snapshot %r is left: %s", name, error)
                return
        if aside is None:
            return
        try:
            _remove_tree(aside)
        except OSError as error:
            log.warning("the work directory of the committed snapshot %r is not gone from the disk: %s", name, error)

    def remove(self, key: str) -> None:
        """Forget a snapshot and its files. Files that can't be removed are left to `cleanup`, with a warning."""
        with self._lock:
            with self._metadata.transaction():
                number = self._metadata.remove(key).id
            try:
                aside = self._put_aside(str(number))
            except OSError as error:
                log.warning("the directory of the removed snapshot %r is left: %s", key, error)
                return
        try:
            _remove_tree(aside)
        except OSError as error:
            log.warning("the removed snapshot %r is not gone from the disk: %s", key, error)

    def stat(self, key: str) -> Snapshot:
        """What is known of a snapshot."""
        with self._lock:
            return self._metadata.get(key)

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Change labels: those that `paths` name, `labels.NAME` each, or all."""
        with self._lock, self._metadata.transaction():
            return self._metadata.update(name, labels, paths)

    def find(self, filters: Sequence[str]) -> list[Snapshot]:
        """The snapshots that match any of the filters, or all if there is none, in the order of their making."""
        accepts = parse_all(filters)
        with self._lock:
            snapshots = self._metadata.all()
        return [snapshot for snapshot in snapshots if accepts(snapshot.field)]

    def usage(self, key: str) -> Usage:
        """What a snapshot adds to its parents: now if it is active, at its commit if it is committed."""
        snapshot = self.stat(key)
        if snapshot.kind != Kind.ACTIVE:
            return snapshot.usage
        try:
            return measure(self._layer(snapshot.id))
        except FileNotFoundError:
            # Removed meanwhile: then that is the answer.
            self.stat(key)
            raise

    def cleanup(self) -> None:
        """Remove the directories that no snapshot has: left by a crash, or by a removal that failed.

        Raises OSError for the first that can't be removed, once all the others are gone.
        """
        with self._lock:
            known = {str(number) for number in self._metadata.ids()}
            left = [name for name in os.listdir(self._snapshots) if name not in known]
            aside = [
                os.path.join(self._snapshots, name) if name.startswith(_REMOVED) else self._put_aside(name)
                for name in left
            ]
        failed: OSError | None = None
        for path in aside:
            try:
                _remove_tree(path)
            except OSError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def _create(self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        for label in MAPPINGS:
            if labels.get(label) and _RANGES.fullmatch(labels[label]) is None:
                raise InvalidArgumentError(f"{label} is not CONTAINER:HOST:COUNT, but {labels[label]!r}")
        with self._lock:
            made = None
            try:
                with self._metadata.transaction():
                    snapshot = self._metadata.create(kind, key, parent, labels)
                    ancestors = self._metadata.ancestors(snapshot)
                    made = str(snapshot.id)
                    self._make_directories(snapshot, ancestors)
            except BaseException:
                if made is not None and os.path.lexists(os.path.join(self._snapshots, made)):
                    _remove_tree(self._put_aside(made))
                raise
        return self._mounts(snapshot, ancestors)

    def _make_directories(self, snapshot: Snapshot, ancestors: Sequence[int]) -> None:
        directory = os.path.join(self._snapshots, str(snapshot.id))
        if os.path.lexists(directory):
            # Of a snapshot whose row a crash took back, and its number with it.
            self._put_aside(str(snapshot.id))
        os.mkdir(directory, 0o700)
        layer = self._layer(snapshot.id)
        os.mkdir(layer, 0o755)
        os.chmod(layer, 0o755)
        if snapshot.kind == Kind.ACTIVE:
            os.mkdir(os.path.join(directory, "work"), 0o711)
        if ancestors:
            # The root directory of the mount is that of its topmost layer.
            status = os.stat(self._layer(ancestors[0]))
            os.chown(layer, status.st_uid, status.st_gid)
            os.chmod(layer, status.st_mode & 0o7777)

    def _mounts(self, snapshot: Snapshot, ancestors: Sequence[int]) -> list[Mount]:
        mappings = [
            f"{option}={snapshot.labels[label].replace(',', ':')}"
            for label, option in MAPPINGS.items()
            if label in snapshot.labels
        ]
        active = snapshot.kind == Kind.ACTIVE
        own = self._layer(snapshot.id)
        lowers = [self._layer(number) for number in ancestors]
        if not mappings and not active and len(lowers) <= 1:
            return [Mount("bind", lowers[0] if lowers else own, ("ro", "rbind"))]
        if not mappings and not lowers:
            return [Mount("bind", own, ("rw", "rbind"))]
        options = [*mappings]
        if active:
            work = os.path.join(self._snapshots, str(snapshot.id), "work")
            options += [f"workdir={work}", f"upperdir={own}"]
            lowers = lowers or [os.path.join(self._root, "empty")]
        else:
            options.append("ro")
        options.append(f"lowerdir={':'.join(lowers or [own])}")
        unpacking = active and not mappings and _UNPACKING.fullmatch(snapshot.name)
        return [Mount(UNPACKED if unpacking and self._initial else OVERLAY, "overlay", options)]

    def _layer(self, number: int) -> str:
        return os.path.join(self._snapshots, str(number), "fs")

    def _put_aside(self, name: str) -> str:
        """Rename what lies in `snapshots`, so that its name is free while it is being removed; the new path."""
        # A mkdir would fail on a full disk, where removing matters most.
        aside = os.path.join(self._snapshots, f"{_REMOVED}{name.replace('/', '-')}-{time.time_ns()}")
        os.rename(os.path.join(self._snapshots, name), aside)
        return aside

    def _put_work_aside(self, number: int) -> str | None:
        """Put the work directory of a committed snapshot aside, as no mount will need it; None if one still does.

        Its index has links to files of the layer, which would count among their names.
        """
        work = f"{number}/work"
        fd = os.open(os.path.join(self._snapshots, work), os.O_RDONLY | os.O_DIRECTORY)
        try:
            # A daemon holds the lock as long as it serves.
            return self._put_aside(work) if try_lock_dir(fd) else None
        finally:
            os.close(fd)


def _remove_tree(path: str) -> None:
    """Remove a tree of any depth, not going into other filesystems. Raises OSError."""
    # shutil.rmtree ends at the recursion limit, which a container can exceed.
    done = subprocess.run(
        ["rm", "-rf", "--one-file-system", "--", path],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
    )
    if done.returncode != 0:
        first = done.stderr.partition("\n")[0]
        raise OSError(f"{path} was not removed, or not whole: {first}")
