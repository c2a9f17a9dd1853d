"""A kernel that is short of memory for what rings ask of it: everything is answered all the same, only later."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import Layers
from tests.support.mounts import our_mount
from tests.support.uring import switch_kept

# Stands before the C library. Of every three calls that submit something one takes nothing and says so, and one takes
# all but the last; as such calls of the kernel do, they don't wait. Of three messages to a ring one gets through; those
# of the main thread, which shows that rings can be had, all do.
SHORT: Final = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>

long syscall(long number, ...)
{
    static unsigned enters, messages;
    long (*real)(long, ...) = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    long a[6];
    va_list list;

    va_start(list, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    if (number == SYS_io_uring_enter && (unsigned)a[1] > 0)
        switch (__atomic_fetch_add(&enters, 1, __ATOMIC_RELAXED) % 3) {
        case 0:
            errno = EAGAIN;
            return -1;
        case 1:
            return real(number, a[0], a[1] - 1, 0L, 0L, 0L, 0L);
        }
    if (number == SYS_io_uring_register && a[1] == 31 && gettid() != getpid() &&
        __atomic_fetch_add(&messages, 1, __ATOMIC_RELAXED) % 3 != 2) {
        errno = ENOMEM;
        return -1;
    }
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
"""
COUNT: Final = 60


@pytest.fixture
def shortage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mounted from here on has it."""
    library = tmp_path / "short.so"
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-o", str(library), "-", "-ldl"]
    subprocess.run(command, input=SHORT.encode(), check=True)
    before = os.environ.get("LD_PRELOAD", "").split()
    monkeypatch.setenv("LD_PRELOAD", " ".join([*before, str(library)]))


@pytest.mark.usefixtures("shortage")
def test_nothing_is_lost_where_the_kernel_takes_less_than_it_is_given(layers: Layers) -> None:
    for number in range(COUNT):
        (layers.lower / f"lower{number}").write_bytes(b"of the lower layer" * 1000)

    def change(number: int) -> None:
        # One that is answered at once, and one that another thread answers.
        (layers.mnt / f"new{number}").write_bytes(b"new")
        with open(layers.mnt / f"lower{number}", "r+b") as file:
            file.write(b"OF")
            file.flush()
            os.fsync(file.fileno())

    with (
        switch_kept(),
        our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "engine=native,uring=on", limit=60) as live,
    ):
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(change, number) for number in range(COUNT)]:
                done.result()
        for number in range(COUNT):
            assert (layers.mnt / f"new{number}").read_bytes() == b"new"
            assert (layers.mnt / f"lower{number}").read_bytes()[:4] == b"OF t"
        assert live.log is not None
        assert "a ring can't be woken" in live.log.read_text(), "there was no shortage"
