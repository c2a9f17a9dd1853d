"""A process that changes rows of a database: `python -m tests.crash.database FILE JOURNAL WRITER WRITERS ROUNDS`.

Row N holds N, a version and a filling made of both. Each writer has rows of its own and commits them in one transaction
a round; it prints the versions it has committed.
"""

import json
import random
import sqlite3
import sys
import time
from typing import Final

ROWS: Final = 22_000
_FILLING: Final = 4000
_PATIENCE: Final = 90.0  # seconds


def filling(row: int, version: int) -> bytes:
    return random.Random(row << 20 | version).randbytes(64) * (_FILLING // 64)


def make(path: str, journal: str) -> None:
    """A database of about 90 MB."""
    database = sqlite3.connect(path)
    database.execute("PRAGMA page_size=4096")
    database.execute(f"PRAGMA journal_mode={journal}")
    database.execute("CREATE TABLE data (id INTEGER PRIMARY KEY, version INTEGER, filling BLOB)")
    database.executemany("INSERT INTO data VALUES (?, 0, ?)", ((row, filling(row, 0)) for row in range(ROWS)))
    database.commit()
    database.close()


def connect(path: str, journal: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
    database.execute("PRAGMA mmap_size=268435456")
    database.execute("PRAGMA synchronous=NORMAL")
    mode = _switch(database, journal)
    if mode != journal:
        raise RuntimeError(f"the journal is {mode}")
    return database


def _switch(database: sqlite3.Connection, journal: str) -> str:
    """Choose a journal. SQLite doesn't wait for other connections that just do so, on any filesystem."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            mode: str = database.execute(f"PRAGMA journal_mode={journal}").fetchone()[0]
            return mode
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def rows_of(writer: int, writers: int) -> range:
    return range(writer, ROWS, writers * 60)


def change(path: str, journal: str, writer: int, writers: int, rounds: int) -> None:
    database = connect(path, journal)
    versions: dict[int, int] = {}
    for version in range(1, rounds + 1):
        database.execute("BEGIN IMMEDIATE")
        for row in rows_of(writer, writers):
            found = database.execute("SELECT version, filling FROM data WHERE id=?", (row,)).fetchone()
            if found != (version - 1, filling(row, version - 1)):
                raise ValueError(f"row {row}: {found[0]} instead of {version - 1}")
            database.execute("UPDATE data SET version=?, filling=? WHERE id=?", (version, filling(row, version), row))
        database.execute("COMMIT")
        versions.update(dict.fromkeys(rows_of(writer, writers), version))
    database.close()
    print(json.dumps(versions))


def check(path: str, expected: dict[int, int]) -> list[str]:
    """What is wrong with a database whose rows should have these versions, all others version 0."""
    database = sqlite3.connect(path)
    wrong = [line for (line,) in database.execute("PRAGMA integrity_check") if line != "ok"]
    count = 0
    for row, version, filled in database.execute("SELECT id, version, filling FROM data"):
        count += 1
        if version != expected.get(row, 0):
            wrong.append(f"row {row} has version {version} instead of {expected.get(row, 0)}")
        elif filled != filling(row, version):
            wrong.append(f"row {row} is damaged")
    database.close()
    return wrong if count == ROWS else [*wrong, f"{count} rows"]


if __name__ == "__main__":
    change(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
