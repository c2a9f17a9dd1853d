"""Parallel clients: each does the same amount, so that the time stays level as far as they are served side by side."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.inputs import MIB, read_all
from benchmarks.site import Site, WrongResult
from benchmarks.workload import workload

_CLIENTS: Final = (1, 2, 4, 8)
_BLOCK: Final = 128 * 1024


def _together(site: Site, client: Callable[[Site, Path], None]) -> None:
    """Run a function in as many processes as the size says, each with a directory; measures until the last one ends."""
    processes = multiprocessing.get_context("fork")
    ready = processes.Barrier(site.size + 1)

    for number in range(site.size):
        (site.mnt / f"client{number}").mkdir(exist_ok=True)

    def run(number: int) -> None:
        ready.wait()
        client(site, site.mnt / f"client{number}")

    started = [processes.Process(target=run, args=(number,)) for number in range(site.size)]
    for process in started:
        process.start()
    # All but the last step of the start is done when the clock starts.
    while ready.n_waiting < site.size:
        time.sleep(0.001)
    with site.clock:
        ready.wait()
        for process in started:
            process.join()
    if any(process.exitcode for process in started):
        raise WrongResult("a client failed")


@workload("clients-walk", "{size} clients walk 500 files each", group="clients", sizes=_CLIENTS, lowers=["parts"])
def walk(site: Site) -> None:
    def client(site: Site, folder: Path) -> None:
        with os.scandir(folder / "files") as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)

    _together(site, client)


@workload("clients-read", "{size} clients read 16 MiB each", group="clients", sizes=_CLIENTS, lowers=["parts"])
def read(site: Site) -> None:
    def client(site: Site, folder: Path) -> None:
        read_all(folder / "blocks")

    _together(site, client)


@workload(
    "clients-create",
    "{size} clients create 300 files each",
    group="clients",
    sizes=_CLIENTS,
    writes=True,
    filesystem="journal",
)
def create(site: Site) -> None:
    def client(site: Site, folder: Path) -> None:
        for number in range(site.count(300)):
            (folder / f"new{number}").write_bytes(b"content")

    _together(site, client)


@workload(
    "clients-write",
    "{size} clients write 16 MiB each",
    group="clients",
    sizes=_CLIENTS,
    writes=True,
    filesystem="journal",
)
def write(site: Site) -> None:
    block = bytes(_BLOCK)

    def client(site: Site, folder: Path) -> None:
        with (folder / "new").open("wb", buffering=0) as file:
            for _ in range(site.count(16) * MIB // _BLOCK):
                file.write(block)

    _together(site, client)
