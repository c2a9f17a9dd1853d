"""Programs on the mount: run, refused, busy while they run, and set-user-id."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.posix.rig import OTHER, OWNER, Root, as_user, fails, opened, prepared, read, write

SCRIPT = b"#!/bin/sh\nexit 7\n"


def build_programs() -> None:
    shutil.copy(shutil.which("sleep") or "", "program")
    os.chmod("program", 0o755)
    write("script", SCRIPT, 0o755)
    write("plain", SCRIPT, 0o644)
    os.symlink("script", "link")
    os.mkdir("d")


def status_of(*command: str) -> int:
    return subprocess.run(command, check=False, timeout=30).returncode


@prepared(build_programs)
def test_programs_and_scripts_run(root: Root) -> None:
    assert status_of("./program", "0") == 0
    assert status_of("./script") == 7
    assert status_of("./link") == 7
    with opened("program") as descriptor:
        done = subprocess.run([f"/proc/self/fd/{descriptor}", "0"], pass_fds=(descriptor,), check=False, timeout=30)
        assert done.returncode == 0


@prepared(build_programs)
def test_only_executable_files_run(root: Root) -> None:
    for name in ("plain", "d"):
        with fails(errno.EACCES):
            os.execv(f"./{name}", [name])
    with fails(errno.ENOENT):
        os.execv("./missing", ["missing"])
    write("junk", b"no program", 0o755)
    with fails(errno.ENOEXEC):
        os.execv("./junk", ["junk"])
    os.chmod("script", 0o744)
    with fails(errno.EACCES):
        as_user(OTHER, os.execv, "./script", ["script"])
    os.chmod("script", 0o711)
    # A program may be run by those who may not read it, but a script has to be read.
    os.chmod("program", 0o711)
    assert as_user(OTHER, status_of, "./program", "0") == 0


@contextlib.contextmanager
def running(path: str) -> Iterator[None]:
    process = subprocess.Popen([path, "60"])
    try:
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@prepared(build_programs)
def test_a_running_program_is_not_written(root: Root) -> None:
    size = os.stat("program").st_size
    with running("./program"):
        with root.touches(program=""):
            for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT):
                with fails(errno.ETXTBSY):
                    os.open("program", flags)
            with fails(errno.ETXTBSY):
                os.truncate("program", 1)
        os.close(os.open("program", os.O_RDONLY))
        os.chmod("program", 0o700)
        os.rename("program", "renamed")
        with fails(errno.ETXTBSY):
            os.open("renamed", os.O_WRONLY)
        os.unlink("renamed")
        write("program", b"new")
    assert read("program") == b"new"
    assert size > 3


@prepared(build_programs)
def test_a_program_that_is_open_for_writing_does_not_run(root: Root) -> None:
    with opened("program", os.O_WRONLY), fails(errno.ETXTBSY):
        os.execv("./program", ["program", "0"])
    assert status_of("./program", "0") == 0


@prepared(build_programs)
def test_a_program_runs_on_after_its_removal_and_replacement(root: Root) -> None:
    process = subprocess.Popen(["./program", "0.2"])
    os.unlink("program")
    write("program", SCRIPT, 0o755)
    assert status_of("./program") == 7
    assert process.wait(30) == 0


@prepared(build_programs)
def test_a_changed_program_runs_changed(root: Root) -> None:
    for code in (7, 8, 9):
        write("script", b"#!/bin/sh\nexit %d\n" % code, 0o755)
        assert status_of("./script") == code
    with opened("script", os.O_WRONLY) as descriptor:
        os.pwrite(descriptor, b"3", len(b"#!/bin/sh\nexit "))
    assert status_of("./script") == 3


def build_id() -> None:
    shutil.copy(shutil.which("id") or "", "id")


@pytest.mark.parametrize(("bit", "expected"), [(0o4755, "euid"), (0o2755, "egid"), (0o755, "none")])
@prepared(build_id)
def test_a_set_id_program_runs_with_the_ids_of_its_file(root: Root, bit: int, expected: str) -> None:
    os.chown("id", OWNER.uid, OWNER.gid)
    os.chmod("id", bit)

    def ids() -> tuple[str, str]:
        shown = [
            subprocess.run(["./id", option], capture_output=True, text=True, check=True, timeout=30).stdout.strip()
            for option in ("-u", "-g")
        ]
        return shown[0], shown[1]

    uid, gid = as_user(OTHER, ids)
    assert uid == str(OWNER.uid if expected == "euid" else OTHER.uid)
    assert gid == str(OWNER.gid if expected == "egid" else OTHER.gid)
