"""A file of numbered, signed pages that many processes write at once: `python -m tests.crash.pages ROLE FILE ...`.

Page N holds N, a version and their checksum all over, so that a torn, stale, lost or misplaced page shows.
"""

import mmap
import os
import struct
import sys
import time
import zlib
from typing import Final

PAGE: Final = 4096
_HEAD: Final = struct.Struct("<QQI")


def page(number: int, version: int) -> bytes:
    """The content of a page."""
    seed = struct.pack("<QQ", number, version)
    body = seed * ((PAGE - _HEAD.size) // len(seed) + 1)
    return _HEAD.pack(number, version, zlib.crc32(seed)) + body[: PAGE - _HEAD.size]


def version_of(number: int, data: bytes) -> int:
    """The version of a page as read; ValueError for one that is not what was written."""
    found, version, _ = _HEAD.unpack_from(data)
    if found != number or data != page(number, version):
        raise ValueError(f"page {number} is damaged: {data[:64].hex()}")
    return int(version)


def make(path: str, pages: int) -> None:
    with open(path, "wb", 1 << 20) as file:
        for number in range(pages):
            file.write(page(number, 0))


def check(path: str, expected: dict[int, int], pages: int) -> list[str]:
    """What is wrong with a file whose pages should have these versions, all others version 0."""
    wrong = []
    with open(path, "rb", 1 << 20) as file:
        for number in range(pages):
            try:
                version = version_of(number, file.read(PAGE))
            except (ValueError, struct.error) as error:
                wrong.append(str(error))
                continue
            if version != expected.get(number, 0):
                wrong.append(f"page {number} has version {version} instead of {expected.get(number, 0)}")
        if file.read(1):
            wrong.append("the file has grown")
    return wrong


def write(path: str, how: str, first: int, step: int, rounds: int, pages: int) -> None:
    """Raise the version of every `step`-th page from `first` on, `rounds` times, checking each before and after."""
    descriptor = os.open(path, os.O_RDWR)
    mapped = mmap.mmap(descriptor, pages * PAGE, mmap.MAP_SHARED) if how == "mmap" else None
    for version in range(1, rounds + 1):
        for number in range(first, pages, step):
            at = number * PAGE
            before = mapped[at : at + PAGE] if mapped is not None else os.pread(descriptor, PAGE, at)
            if version_of(number, before) != version - 1:
                raise ValueError(f"page {number} has gone back to version {version_of(number, before)}")
            if mapped is not None:
                mapped[at : at + PAGE] = page(number, version)
                after = os.pread(descriptor, PAGE, at)
            else:
                os.pwrite(descriptor, page(number, version), at)
                after = os.pread(descriptor, PAGE, at)
            if version_of(number, after) != version:
                raise ValueError(f"page {number} does not show version {version}")
    if mapped is not None:
        mapped.flush()
        mapped.close()
    os.close(descriptor)


def watch(path: str, pages: int, until: str) -> None:
    """Through a descriptor and a mapping from before the first write, see no page torn or going back."""
    descriptor = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(descriptor, pages * PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
    seen = [0] * pages
    print("ready", flush=True)
    rounds = 0
    last = False
    while True:
        for number in range(rounds % 3, pages, 3):
            at = number * PAGE
            head = mapped[at : at + 16] if rounds % 2 else os.pread(descriptor, 16, at)
            found, version = struct.unpack("<QQ", head)
            if found != number or version < seen[number]:
                raise ValueError(f"page {number} shows {found}, version {version} after {seen[number]}")
            seen[number] = version
        rounds += 1
        if last and rounds % 6 == 0:
            return
        last = last or os.path.exists(until)
        time.sleep(0.01)


if __name__ == "__main__":
    role, target, *rest = sys.argv[1:]
    if role == "write":
        write(target, rest[0], *map(int, rest[1:]))
    else:
        watch(target, int(rest[0]), rest[1])
