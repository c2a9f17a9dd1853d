"""What is known of snapshots, in SQLite: containerd's rules of names, parents, kinds and labels.

Active snapshots and committed ones share one space of names. A transaction is on disk when it ends. Times are in
nanoseconds since the epoch.
"""

import contextlib
import enum
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from overlayfs_py.drivers.containerd.failures import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from overlayfs_py.drivers.containerd.usage import Usage

REFERENCE = "containerd.io/snapshot.ref"
"""The label that says what content a snapshot is to hold: the chain ID of an image's layers, usually."""

LABEL_LIMIT = 4096
"""Bytes that the name and the value of a label take together, at most."""

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    parent INTEGER REFERENCES snapshots (id),
    kind INTEGER NOT NULL,
    created INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    size INTEGER NOT NULL DEFAULT 0,
    inodes INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX snapshots_by_parent ON snapshots (parent);
CREATE TABLE labels (
    snapshot INTEGER NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (snapshot, name)
) WITHOUT ROWID;
CREATE INDEX labels_by_value ON labels (name, value);
"""
_SELECT = """
SELECT s.id, s.name, coalesce(p.name, ''), s.kind, s.created, s.updated, s.size, s.inodes
FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent
"""


class Kind(enum.IntEnum):
    """The kinds of snapshots, numbered as in containerd's API."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot; `parent` is a name, "" where there is none. The usage is that at its commit."""

    id: int
    name: str
    parent: str
    kind: Kind
    created: int
    updated: int
    usage: Usage
    labels: Mapping[str, str]

    def field(self, path: Sequence[str]) -> str | None:
        """What a filter calls `path`; None where there is no such thing."""
        match path:
            case ["name"]:
                return self.name
            case ["parent"]:
                return self.parent
            case ["kind"]:
                return self.kind.name.lower()
            case ["labels", *words]:
                return self.labels.get(".".join(words))
        return None


class Metadata:
    """The database. Not safe for use by two threads at once: its user holds a lock."""

    __slots__ = ("_database",)

    def __init__(self, path: str) -> None:
        """Open it, or make it. Raises sqlite3.Error, and InvalidArgumentError for one of a later version."""
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(path)
        except BaseException:
            self._database.close()
            raise

    def _prepare(self, path: str) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute("PRAGMA foreign_keys = ON")
        with self.transaction():
            version: int = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            elif version != _SCHEMA_VERSION:
                raise InvalidArgumentError(f"{path} is of version {version}, written by a later overlayfs-py")

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is done within is kept when it ends, and nothing of it when it raises."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def get(self, name: str) -> Snapshot:
        """The snapshot of this name. Raises NotFoundError."""
        row = self._database.execute(f"{_SELECT} WHERE s.name = ?", (name,)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no snapshot {name!r}")
        labels = self._database.execute("SELECT name, value FROM labels WHERE snapshot = ?", (row[0],))
        return _snapshot(row, dict(labels))

    def all(self) -> list[Snapshot]:
        """All snapshots, in the order of their making."""
        labels: dict[int, dict[str, str]] = {}
        for snapshot, name, value in self._database.execute("SELECT snapshot, name, value FROM labels"):
            labels.setdefault(snapshot, {})[name] = value
        rows = self._database.execute(f"{_SELECT} ORDER BY s.id")
        return [_snapshot(row, labels.get(row[0], {})) for row in rows]

    def ids(self) -> set[int]:
        """The numbers of all snapshots."""
        return {row[0] for row in self._database.execute("SELECT id FROM snapshots")}

    def ancestors(self, snapshot: Snapshot) -> list[int]:
        """The numbers of what it is built on, its parent first."""
        rows = self._database.execute(
            "WITH RECURSIVE line (id, depth) AS ("
            " SELECT parent, 1 FROM snapshots WHERE id = ?"
            " UNION ALL SELECT s.parent, depth + 1 FROM line JOIN snapshots s USING (id)"
            ") SELECT id FROM line WHERE id IS NOT NULL ORDER BY depth",
            (snapshot.id,),
        )
        return [row[0] for row in rows]

    def create(self, kind: Kind, name: str, parent: str, labels: Mapping[str, str]) -> Snapshot:
        """Add a snapshot that is not committed.

        Raises InvalidArgumentError, NotFoundError for the parent, and AlreadyExistsError for the name, or when a
        committed snapshot with this parent holds the content that the label of the reference asks for.
        """
        if not name:
            raise InvalidArgumentError("a snapshot needs a key")
        _check_labels(labels)
        parent_id = None
        if parent:
            found = self.get(parent)
            if found.kind != Kind.COMMITTED:
                raise InvalidArgumentError(f"the parent {parent!r} is not a committed snapshot")
            parent_id = found.id
        self._check_free(name)
        if kind == Kind.ACTIVE and labels.get(REFERENCE):
            self._check_absent(labels[REFERENCE], parent_id)
        now = time.time_ns()
        cursor = self._database.execute(
            "INSERT INTO snapshots (name, parent, kind, created, updated) VALUES (?, ?, ?, ?, ?)",
            (name, parent_id, kind, now, now),
        )
        assert cursor.lastrowid is not None
        self._set_labels(cursor.lastrowid, labels)
        return self.get(name)

    def commit(self, name: str, key: str, usage: Usage, labels: Mapping[str, str]) -> int:
        """Make the active snapshot `key` the committed one `name`, with these labels and no others; its number.

        Raises InvalidArgumentError, NotFoundError, AlreadyExistsError, and FailedPreconditionError for one that is
        not active.
        """
        if not name:
            raise InvalidArgumentError("a committed snapshot needs a name")
        _check_labels(labels)
        snapshot = self.get(key)
        if snapshot.kind != Kind.ACTIVE:
            raise FailedPreconditionError(f"the snapshot {key!r} is not active")
        self._check_free(name)
        now = time.time_ns()
        self._database.execute(
            "UPDATE snapshots SET name = ?, kind = ?, created = ?, updated = ?, size = ?, inodes = ? WHERE id = ?",
            (name, Kind.COMMITTED, now, now, usage.size, usage.inodes, snapshot.id),
        )
        self._set_labels(snapshot.id, labels)
        return snapshot.id

    def remove(self, name: str) -> Snapshot:
        """Forget a snapshot. Raises NotFoundError, and FailedPreconditionError when others are built on it."""
        snapshot = self.get(name)
        child = self._database.execute("SELECT name FROM snapshots WHERE parent = ?", (snapshot.id,)).fetchone()
        if child is not None:
            raise FailedPreconditionError(f"the snapshot {name!r} is the parent of {child[0]!r}")
        self._database.execute("DELETE FROM snapshots WHERE id = ?", (snapshot.id,))
        return snapshot

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Set the labels that `paths` name (`labels`, or `labels.NAME`), all of them when it is empty.

        A label set to "" is removed. Raises NotFoundError, and InvalidArgumentError for any other path.
        """
        snapshot = self.get(name)
        changed = dict(snapshot.labels)
        for path in paths or ("labels",):
            field, _, label = path.partition(".")
            if field != "labels":
                raise InvalidArgumentError(f"{path!r} of the snapshot {name!r} can't be changed")
            if label:
                changed[label] = labels.get(label, "")
            else:
                changed = dict(labels)
        _check_labels(changed)
        self._set_labels(snapshot.id, changed)
        # Never earlier than it was, even when the clock was set back.
        updated = max(time.time_ns(), snapshot.updated)
        self._database.execute("UPDATE snapshots SET updated = ? WHERE id = ?", (updated, snapshot.id))
        return self.get(name)

    def _check_free(self, name: str) -> None:
        if self._database.execute("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone() is not None:
            raise AlreadyExistsError(f"there is a snapshot {name!r} already")

    def _check_absent(self, reference: str, parent_id: int | None) -> None:
        found = self._database.execute(
            "SELECT s.name FROM labels l JOIN snapshots s ON s.id = l.snapshot"
            " WHERE l.name = ? AND l.value = ? AND s.kind = ? AND s.parent IS ?",
            (REFERENCE, reference, Kind.COMMITTED, parent_id),
        ).fetchone()
        if found is not None:
            raise AlreadyExistsError(f"the snapshot {found[0]!r} holds {reference!r} already")

    def _set_labels(self, snapshot: int, labels: Mapping[str, str]) -> None:
        self._database.execute("DELETE FROM labels WHERE snapshot = ?", (snapshot,))
        self._database.executemany(
            "INSERT INTO labels (snapshot, name, value) VALUES (?, ?, ?)",
            [(snapshot, name, value) for name, value in labels.items() if value],
        )


def _snapshot(row: tuple[int, str, str, int, int, int, int, int], labels: Mapping[str, str]) -> Snapshot:
    number, name, parent, kind, created, updated, size, inodes = row
    return Snapshot(number, name, parent, Kind(kind), created, updated, Usage(size, inodes), labels)


def _check_labels(labels: Mapping[str, str]) -> None:
    for name, value in labels.items():
        if not name:
            raise InvalidArgumentError("a label needs a name")
        if len(name.encode()) + len(value.encode()) > LABEL_LIMIT:
            raise InvalidArgumentError(f"the label {name[:64]!r} and its value take more than {LABEL_LIMIT} bytes")
