"""Locks, and what the process may do."""

import os
import subprocess
import sys

from overlayfs_py.sys import credentials, locking, paths
from tests.sys.conftest import Place


def in_a_child(code: str, *before: str) -> str:
    """What a new interpreter prints."""
    command = [*before, sys.executable, "-c", f"import os\nfrom overlayfs_py.sys import credentials\n{code}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_a_directory_is_locked_by_one_at_a_time(place: Place) -> None:
    first = paths.open_dir_read(place.fd)
    second = paths.open_dir_read(place.fd)
    assert locking.try_lock_dir(first)
    assert locking.try_lock_dir(first)
    assert not locking.try_lock_dir(second)
    os.close(first)
    assert locking.try_lock_dir(second)
    os.close(second)


def test_root_has_the_capabilities_of_root() -> None:
    assert credentials.has_capability(credentials.CAP_SYS_ADMIN)
    assert credentials.has_capability(credentials.CAP_MKNOD)


def test_another_user_has_none() -> None:
    assert in_a_child("os.setuid(65534); print(credentials.has_capability(credentials.CAP_CHOWN))") == "False"


def test_a_user_namespace_is_not_the_first_one() -> None:
    show = "print(credentials.in_initial_user_namespace(), credentials.has_capability(credentials.CAP_SYS_ADMIN))"
    assert in_a_child(show) == "True True"
    assert in_a_child(show, "unshare", "-Ur") == "False True"
