"""What a directory takes on disk."""

import os
import stat
from dataclasses import dataclass

from overlayfs_py.sys import files, paths


@dataclass(frozen=True, slots=True)
class Usage:
    """Space in bytes, as allocated, and the number of inodes, the top directory's included."""

    size: int = 0
    inodes: int = 0


_BLOCK = 512  # bytes in a unit of st_blocks, stat(2)


def measure(directory: str) -> Usage:
    """What the tree below `directory` takes, hard links counted once; what goes away meanwhile does not count.

    No symbolic link is followed, and no depth is too great. Raises OSError.
    """
    seen: set[tuple[int, int]] = set()
    size = 0
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        size += os.fstat(root).st_blocks * _BLOCK
        inodes = 1
        pending = [b""]
        while pending:
            path = pending.pop()
            for name, status in _entries(root, path):
                identity = (status.st_dev, status.st_ino)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(path + b"/" + name if path else name)
                elif status.st_nlink > 1 and identity in seen:
                    continue
                elif status.st_nlink > 1:
                    seen.add(identity)
                size += status.st_blocks * _BLOCK
                inodes += 1
    finally:
        os.close(root)
    return Usage(size, inodes)


def _entries(root: int, path: bytes) -> list[tuple[bytes, os.stat_result]]:
    try:
        fd = paths.open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        # A container at work removed it, or put something else in its place.
        return []
    found: list[tuple[bytes, os.stat_result]] = []
    try:
        for name, _, _ in files.list_dir(fd):
            try:
                found.append((name, os.stat(name, dir_fd=fd, follow_symlinks=False)))
            except FileNotFoundError:
                continue
    finally:
        os.close(fd)
    return found
