"""Making files as another user."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from overlayfs_py.sys import credentials
from overlayfs_py.sys.credentials import acting_as


def status() -> dict[str, str]:
    """What this thread may do, and for whom it makes files."""
    lines = Path(f"/proc/self/task/{threading.get_native_id()}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines if line[:3] in ("Uid", "Gid", "Cap"))


def test_what_is_made_is_anothers_and_all_is_as_before(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o700)
    before = status()
    with acting_as(1000, 2000):
        during = status()
        (tmp_path / "f").touch()
    assert status() == before
    assert {name: value for name, value in during.items() if name[:3] == "Cap"} == {
        name: value for name, value in before.items() if name[:3] == "Cap"
    }
    made = (tmp_path / "f").stat()
    assert (made.st_uid, made.st_gid) == (1000, 2000)
    (tmp_path / "g").touch()
    assert (tmp_path / "g").stat().st_uid == 0


def test_all_is_as_before_after_an_error() -> None:
    before = status()
    with pytest.raises(FileNotFoundError), acting_as(1000, 2000):
        os.mkdir("/nonexistent/d")
    assert status() == before


def test_other_threads_stay_who_they_are() -> None:
    before = status()
    acting, enough = threading.Event(), threading.Event()

    def act() -> None:
        with acting_as(1000, 2000):
            acting.set()
            enough.wait(60)

    other = threading.Thread(target=act)
    other.start()
    try:
        assert acting.wait(60)
        assert status() == before
    finally:
        enough.set()
        other.join()


def test_ids_that_there_are_not_are_refused_and_nothing_changes() -> None:
    code = """
import errno, os
from overlayfs_py.sys.credentials import acting_as, may_act_as_others

def status():
    return [line for line in open("/proc/self/status") if line[:3] in ("Uid", "Gid", "Cap")]

before = status()
assert may_act_as_others()
for ids in ((1000, 0), (0, 1000)):
    try:
        with acting_as(*ids):
            print("acted")
    except OSError as error:
        print(errno.errorcode[error.errno])
assert status() == before
"""
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("EOVERFLOW\nEOVERFLOW\n", 0), done.stderr


def test_who_is_not_root_acts_as_nobody_else() -> None:
    assert credentials.may_act_as_others()
    code = "from overlayfs_py.sys.credentials import may_act_as_others as may; print(may())"
    command = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all", "/usr/bin/python3", "-c", code]
    done = subprocess.run(
        command, cwd=Path(credentials.__file__).parents[2], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
