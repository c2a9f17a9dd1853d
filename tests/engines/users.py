"""Users of the machine that are there in the mount namespace of the tests alone."""

import os
from contextlib import ExitStack
from pathlib import Path

from tests.support.syscalls import MNT_DETACH, MS_BIND, mount, umount


def bind(source: Path, target: Path, stack: ExitStack) -> None:
    """Mount a file or directory at a second place, until the stack ends."""
    mount(os.fsencode(source), os.fsencode(target), None, MS_BIND)
    stack.callback(umount, os.fsencode(target), MNT_DETACH)


def add_user(base: Path, name: str, identity: int, stack: ExitStack) -> None:
    """A user whose home is `base`, where its files are kept, with the 65,536 subordinate ids from 200,000 on."""
    texts = {
        "passwd": Path("/etc/passwd").read_text() + f"{name}:x:{identity}:{identity}::{base}:/bin/sh\n",
        "group": Path("/etc/group").read_text() + f"{name}:x:{identity}:\n",
        "subuid": f"{name}:200000:65536\n",
        "subgid": f"{name}:200000:65536\n",
    }
    for file, text in texts.items():
        (base / file).write_text(text)
        (base / file).chmod(0o644)
        bind(base / file, Path("/etc") / file, stack)
