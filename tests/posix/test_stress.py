"""Many processes at once on the same few names: each call succeeds or fails for a good reason, and all agree."""

import errno
import os
import random
import threading
from collections.abc import Callable
from functools import partial

import pytest

from tests.posix import calls
from tests.posix.files import kind_of
from tests.posix.rig import Root, in_parallel, opened, prepared, read, write

NAMES = [f"{directory}{name}" for directory in ("", "d/", "d/e/") for name in ("a", "b", "c")]
# What may happen to a call whose names change under it; EIO, ESTALE and the like may not.
FAIR = {
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOTEMPTY,
    errno.EINVAL,
    errno.EBUSY,
    errno.ELOOP,
    errno.EPERM,
    errno.ENODATA,
    errno.EOPNOTSUPP,
    errno.ENXIO,
}


def build() -> None:
    os.makedirs("d/e")
    for name in NAMES:
        write(name, name.encode() * 100)
        os.link(name, f"{name}.link")


def random_call(dice: random.Random) -> Callable[[], object]:
    one, two = dice.choice(NAMES), dice.choice(NAMES)
    return dice.choice(
        (
            lambda: write(one, two.encode() * dice.randrange(200)),
            lambda: append(one, two.encode()),
            lambda: read(one),
            lambda: os.unlink(one),
            lambda: os.mkdir(one),
            lambda: os.rmdir(one),
            lambda: os.rename(one, two),
            lambda: calls.renameat2(one, two, calls.RENAME_EXCHANGE),
            lambda: calls.renameat2(one, two, calls.RENAME_NOREPLACE),
            lambda: os.link(one, two),
            lambda: os.symlink(two, one),
            lambda: os.chmod(one, 0o600 + dice.randrange(64)),
            lambda: os.truncate(one, dice.randrange(5000)),
            lambda: os.listdir(os.path.dirname(one) or "."),
            lambda: os.stat(one),
            lambda: os.setxattr(one, "user.stress", two.encode()),
            lambda: os.utime(one, (1, dice.randrange(1000))),
            lambda: os.rename("d/e", "d/f") if dice.randrange(2) else os.rename("d/f", "d/e"),
        )
    )


def append(name: str, data: bytes) -> None:
    with opened(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK) as descriptor:
        os.write(descriptor, data)


def trouble(seed: int, count: int) -> list[str]:
    """The unfair errors among so many random calls."""
    dice = random.Random(seed)
    found = []
    for _ in range(count):
        action = random_call(dice)
        try:
            action()
        except OSError as error:
            if error.errno not in FAIR:
                found.append(f"{error}")
    return found


def check_agreement() -> None:
    """Every name that is listed exists and the other way round, by path and by listing, and its type agrees."""
    for where, directories, files in os.walk("."):
        with os.scandir(where) as entries:
            listed = {entry.name: entry.inode() for entry in entries}
        assert set(listed) == {*directories, *files}
        for name, inode in listed.items():
            st = os.lstat(os.path.join(where, name))
            assert st.st_ino == inode
        for name in ("a", "b", "c", "e", "f"):
            assert (kind_of(os.path.join(where, name)) != "missing") == (name in listed)


@pytest.mark.parametrize("seed", range(3))
@prepared(build)
def test_random_calls_of_many_processes_end_in_agreement(root: Root, seed: int) -> None:
    workers = [partial(trouble, seed * 100 + worker, 250) for worker in range(5)]
    assert [found for found in in_parallel(workers) if found] == []
    check_agreement()


@prepared(build)
def test_random_calls_of_many_threads_end_in_agreement(root: Root) -> None:
    found: list[str] = []

    def collect(seed: int) -> None:
        found.extend(trouble(seed, 250))

    threads = [threading.Thread(target=collect, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == []
    check_agreement()


@prepared(build)
def test_exactly_one_of_many_makes_a_name(root: Root) -> None:
    def race(worker: int) -> list[str]:
        won = []
        for number in range(40):
            try:
                os.close(os.open(f"d/race{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
                won.append(f"race{number}")
            except FileExistsError:
                pass
        return won

    winners = in_parallel([partial(race, worker) for worker in range(5)])
    assert sorted(name for won in winners for name in won) == sorted(f"race{number}" for number in range(40))


@prepared(build)
def test_exactly_one_of_many_removes_a_name(root: Root) -> None:
    for number in range(40):
        write(f"d/prey{number}")

    def race() -> int:
        count = 0
        for number in range(40):
            try:
                os.unlink(f"d/prey{number}")
                count += 1
            except FileNotFoundError:
                pass
        return count

    assert sum(in_parallel([race] * 5)) == 40
    assert not any(name.startswith("prey") for name in os.listdir("d"))


@prepared(build)
def test_exactly_one_of_many_moves_a_directory(root: Root) -> None:
    def race(worker: int) -> int:
        count = 0
        for turn in range(10):
            try:
                os.rename(f"turn{turn}", f"taken{turn}-{worker}")
                count += 1
            except FileNotFoundError:
                pass
        return count

    for turn in range(10):
        os.makedirs(f"turn{turn}/inner")
    assert sum(in_parallel([partial(race, worker) for worker in range(4)])) == 10
    taken = [name for name in os.listdir() if name.startswith("taken")]
    assert len(taken) == 10
    assert all(os.listdir(name) == ["inner"] for name in taken)


@prepared(build)
def test_a_file_replaced_again_and_again_is_always_one_of_its_versions(root: Root) -> None:
    def replace(worker: int) -> None:
        for _ in range(60):
            write(f"d/tmp{worker}", b"%d " % worker * 500)
            os.rename(f"d/tmp{worker}", "d/a")

    def look() -> None:
        for _ in range(150):
            data = read("d/a")
            assert data in (b"d/a" * 100, *(b"%d " % worker * 500 for worker in range(3)))

    write("d/a", b"d/a" * 100)
    actions: list[Callable[[], None]] = [partial(replace, worker) for worker in range(3)]
    in_parallel([*actions, look, look])


def test_thousands_of_files_are_open_at_once(root: Root) -> None:
    os.mkdir("many")
    descriptors = []
    try:
        for number in range(3000):
            descriptor = os.open(f"many/{number}", os.O_RDWR | os.O_CREAT, 0o600)
            descriptors.append(descriptor)
            os.write(descriptor, b"%d" % number)
        for number in range(0, 3000, 7):
            os.unlink(f"many/{number}")
        for number, descriptor in enumerate(descriptors):
            assert os.pread(descriptor, 10, 0) == b"%d" % number
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert len(os.listdir("many")) == 3000 - len(range(0, 3000, 7))
