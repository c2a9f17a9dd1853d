"""What lies where below the store's root, and how it changes so that a kill at any moment leaves a store that works.

    oci-layout, index.json, blobs/sha256/   an OCI image layout: what there is, by name and by digest
    layers/<chain ID>/                      the unpacked layers
    tmp/<random>/                           what is being made; locked by whoever makes it, else left over
    partial/<digest>                        blobs whose download was cut off
    lock, tmp.lock                          locked while the store, and tmp/, change (flock(2))
    settings.json                           what all layers have in common

The index is replaced in one rename. It alone says what exists: other blobs and layers are leftovers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from overlayfs_py.images.manifest import dump_json, load_json
from overlayfs_py.images.model import ImageError
from overlayfs_py.images.owners import has_one_id
from overlayfs_py.images.trees import remove_tree, temporary_name
from overlayfs_py.sys import credentials

_LAYOUT: Final = {"imageLayoutVersion": "1.0.0"}
_VERSION: Final = 1


class Layout:
    """The paths of one store, its locks, and its index."""

    __slots__ = ("blobs", "layers", "one_owner", "partial", "root", "tmp", "userxattr")

    def __init__(self, root: Path) -> None:
        """Make what is missing. Raises OSError; ImageError where the store is another kind of user's."""
        self.root = root
        self.blobs = root / "blobs" / "sha256"
        self.layers = root / "layers"
        self.tmp = root / "tmp"
        self.partial = root / "partial"
        if not root.exists():
            root.mkdir(mode=0o711, parents=True)
        for path in (self.blobs, self.layers, self.tmp, self.partial):
            # Layers hold set-user-ID programs, maybe old ones, that no other user is to run.
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        privileged = credentials.has_capability(credentials.CAP_SYS_ADMIN) and credentials.in_initial_user_namespace()
        settings = root / "settings.json"
        if not settings.exists():
            with self.locked(exclusive=True):
                if not settings.exists():
                    write_file(root / "oci-layout", dump_json(_LAYOUT))
                    kind = {"version": _VERSION, "userxattr": not privileged, "one_owner": has_one_id()}
                    write_file(settings, dump_json(kind))
        values = read_json(settings)
        if not isinstance(values, dict) or values.get("version") != _VERSION:
            raise ImageError(f"{root} is a store of another version of ovl")
        self.userxattr: bool = bool(values.get("userxattr"))
        if not privileged and not self.userxattr:
            raise ImageError(f"{root} is root's store: use another one (--root), or be root")
        self.one_owner: bool = bool(values.get("one_owner"))
        if has_one_id() and not self.one_owner:
            raise ImageError(
                f"{root} holds files of many owners, for which there are no ids now: "
                "see /etc/subuid and /etc/subgid, or use another store (--root)"
            )

    @contextlib.contextmanager
    def locked(self, *, exclusive: bool) -> Iterator[None]:
        """Hold the store's lock."""
        with _flocked(self.root / "lock", fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH):
            yield

    def read_index(self) -> list[dict[str, Any]]:
        """The descriptors of the manifests, in the order they came."""
        try:
            value = read_json(self.root / "index.json")
        except FileNotFoundError:
            return []
        manifests = value.get("manifests") if isinstance(value, dict) else None
        if not isinstance(manifests, list) or not all(isinstance(entry, dict) for entry in manifests):
            raise ImageError(f"{self.root / 'index.json'} is damaged")
        return manifests

    def index_version(self) -> tuple[int, int]:
        """What differs after each change of the index, also where that says the same again."""
        try:
            found = os.stat(self.root / "index.json")
        except FileNotFoundError:
            return 0, 0
        return found.st_ino, found.st_mtime_ns

    def write_index(self, manifests: list[dict[str, Any]]) -> None:
        """Replace the index; the store is locked exclusively."""
        write_file(self.root / "index.json", json.dumps({"schemaVersion": 2, "manifests": manifests}).encode())

    def blob(self, digest: str) -> Path:
        return self.blobs / digest.removeprefix("sha256:")

    def layer(self, chain_id: str) -> Path:
        return self.layers / chain_id.removeprefix("sha256:")

    def read_blob(self, digest: str) -> bytes:
        """A small blob: a manifest or a configuration."""
        try:
            return self.blob(digest).read_bytes()
        except FileNotFoundError as error:
            raise ImageError(f"the store has lost the blob {digest}: load or pull the image again") from error

    @contextlib.contextmanager
    def session(self) -> Iterator[Path]:
        """A directory for what is being made, gone afterwards; what killed processes have left goes first."""
        name = temporary_name().decode()
        with _flocked(self.root / "tmp.lock", fcntl.LOCK_EX):
            tmp_fd = os.open(self.tmp, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for entry in os.listdir(tmp_fd):
                    self._remove_if_left_over(tmp_fd, os.fsencode(entry))
                os.mkdir(name, 0o700, dir_fd=tmp_fd)
                lock = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tmp_fd)
                fcntl.flock(lock, fcntl.LOCK_EX)
            finally:
                os.close(tmp_fd)
        try:
            yield self.tmp / name
        finally:
            tmp_fd = os.open(self.tmp, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                # Taken apart within itself, where its lock tells others to leave it alone.
                for entry in os.listdir(lock):
                    remove_tree(lock, os.fsencode(entry))
                os.rmdir(name, dir_fd=tmp_fd)
            finally:
                os.close(tmp_fd)
                os.close(lock)

    @staticmethod
    def _remove_if_left_over(tmp_fd: int, name: bytes) -> None:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=tmp_fd)
        except FileNotFoundError:
            # its maker has just removed it
            return
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            if os.fstat(fd).st_nlink:
                remove_tree(tmp_fd, name)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _flocked(path: Path, operation: int) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, operation)
        try:
            yield
        finally:
            # Said aloud, as a process forked meanwhile has a copy of the descriptor, with which the lock would live on.
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def read_json(path: Path) -> Any:
    return load_json(path.read_bytes(), str(path))


def write_file(path: Path, data: bytes) -> None:
    """Put a file in place in one step, and on the disk."""
    part = path.with_name(path.name + ".part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    os.rename(part, path)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
