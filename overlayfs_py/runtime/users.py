"""Whom a process in a container runs as, by the image's own /etc/passwd and /etc/group.

The files are read below the container's root and never through a symbolic link out of it; no name is looked up on the
host. Source: passwd(5), group(5), and docker-run(1) on --user.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from overlayfs_py.images.owners import mapped
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.userns import has_groups
from overlayfs_py.sys.paths import open_in_root

_MOST = 16 << 20  # bytes of such a file that are read
_MAX_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class User:
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def resolve(root_fd: int, text: str, added: Sequence[str] = ()) -> User:
    """The user that `USER[:GROUP]`, names or numbers, means in this root, with the groups `added`.

    Raises ContainerError.
    """
    user, colon, group = text.partition(":")
    accounts = _entries(root_fd, b"etc/passwd", 7)
    groups = _entries(root_fd, b"etc/group", 4)
    user = user or "0"
    account = next((entry for entry in accounts if entry[0] == user), None) or next(
        (entry for entry in accounts if user.isdigit() and entry[2].isdigit() and int(entry[2]) == int(user)), None
    )
    if account is not None:
        uid, gid = _number(account[2], text), _number(account[3], text)
    elif user.isdigit():
        uid, gid = _number(user, text), 0
    else:
        raise ContainerError(f"there is no user {user!r} in the image's /etc/passwd")
    more: list[int] = []
    if group:
        gid = _group(groups, group)
    elif colon:
        raise ContainerError(f"--user {text}: a group is missing after the colon")
    elif account is not None:
        name = account[0]
        more = [int(entry[2]) for entry in groups if name in entry[3].split(",") and entry[2].isdigit()]
    more += [_group(groups, word) for word in added]
    for table, number in (("uid_map", uid), ("gid_map", gid)):
        if not mapped(table, number):
            raise ContainerError(
                f"the user {text or user} has the ids {uid}:{gid}, which are not mapped here: "
                "use -u 0, or have ranges in /etc/subuid and /etc/subgid"
            )
    if not has_groups():
        more = []
    home = account[5] if account is not None and account[5].startswith("/") else "/"
    return User(uid, gid, tuple(sorted(set(more))), home)


def _group(groups: list[list[str]], group: str) -> int:
    for entry in groups:
        if entry[0] == group:
            return _number(entry[2], group)
    if group.isdigit():
        return _number(group, group)
    raise ContainerError(f"there is no group {group!r} in the image's /etc/group")


def _number(text: str, whole: str) -> int:
    if not text.isdigit() or int(text) > _MAX_ID:
        raise ContainerError(f"user {whole!r}: {text!r} is no id from 0 to {_MAX_ID}")
    return int(text)


def _entries(root_fd: int, path: bytes, fields: int) -> list[list[str]]:
    """The well-formed lines of such a file; none where the image has no such file."""
    try:
        # A FIFO must not keep us waiting.
        fd = open_in_root(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ContainerError(f"cannot read the image's /{path.decode()}: {error.strerror}") from error
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return []
        text = file.read(_MOST).decode("utf-8", "surrogateescape")
    return [entry for line in text.splitlines() if len(entry := line.split(":")) == fields]
