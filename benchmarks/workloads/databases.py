"""SQLite: many small commits, each of them a few writes, and a sync where it asks for one."""

import contextlib
import sqlite3

from benchmarks.site import Site
from benchmarks.workload import workload


def _commit(site: Site, times: int, synchronous: str) -> None:
    with contextlib.closing(sqlite3.connect(site.mnt / "data.db", isolation_level=None)) as database:
        database.execute(f"PRAGMA synchronous={synchronous}")
        database.execute("CREATE TABLE record (id INTEGER PRIMARY KEY, content TEXT)")
        with site.clock:
            for number in range(times):
                database.execute("BEGIN")
                database.executemany("INSERT INTO record (content) VALUES (?)", [(f"record {number}" * 10,)] * 5)
                database.execute("COMMIT")
        rows = database.execute("SELECT count(*) FROM record").fetchone()[0]
        site.check("rows", rows, times * 5)
        site.check("integrity", database.execute("PRAGMA integrity_check").fetchone()[0], "ok")


@workload("sqlite", "300 SQLite commits, no fsync", group="databases", writes=True, filesystem="journal")
def sqlite(site: Site) -> None:
    _commit(site, site.count(300), "OFF")


@workload("sqlite-fsync", "100 SQLite commits with fsync", group="databases", writes=True, filesystem="journal")
def sqlite_fsync(site: Site) -> None:
    _commit(site, site.count(100), "FULL")
