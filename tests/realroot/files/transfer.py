"""Move money between accounts at random, from several processes, while others check that none is lost."""

import multiprocessing
import random
import sqlite3
import sys

ACCOUNTS = 4000
TOTAL = ACCOUNTS * 1000


def connect(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=60, isolation_level=None)


def transfer(path: str, seed: int, times: int) -> None:
    choose = random.Random(seed)
    database = connect(path)
    for _ in range(times):
        payer, payee = choose.sample(range(ACCOUNTS), 2)
        note = choose.randbytes(1000)
        database.execute("BEGIN IMMEDIATE")
        database.execute("UPDATE account SET balance = balance - 7, note = ? WHERE id = ?", (note, payer))
        database.execute("UPDATE account SET balance = balance + 7 WHERE id = ?", (payee,))
        database.execute("COMMIT")
    database.close()


def check(path: str, times: int) -> None:
    database = connect(path)
    for _ in range(times):
        (total,) = database.execute("SELECT sum(balance) FROM account").fetchone()
        assert total == TOTAL, total
    database.close()


def main(path: str) -> None:
    database = connect(path)
    assert database.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    jobs = [multiprocessing.Process(target=transfer, args=(path, seed, 150)) for seed in range(3)]
    jobs.append(multiprocessing.Process(target=check, args=(path, 100)))
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
        assert job.exitcode == 0, job.exitcode
    check(path, 1)
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


main(sys.argv[1])
