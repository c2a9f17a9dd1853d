"""Scale: the same work with more layers, files, entries or mounts. Cost has to grow as the work does."""

import os
from typing import Final

from benchmarks.cached import read_into_cache
from benchmarks.site import Site
from benchmarks.workload import workload
from benchmarks.workloads.names import walk

_LAYERS: Final = (1, 10, 60, 500)


@workload(
    "layers-mount",
    "mount {size} layers",
    group="scale",
    sizes=_LAYERS,
    lowers=["layers-{size}"],
    mounted=False,
    rounds=2,
)
def layers_mount(site: Site) -> None:
    with site.clock:
        site.mount()


@workload(
    "layers-walk",
    "walk 3,000 files in {size} layers",
    group="scale",
    sizes=_LAYERS,
    lowers=["layers-{size}"],
    rounds=2,
)
def layers_walk(site: Site) -> None:
    with site.clock:
        found = walk(site, site.mnt)
    site.check("entries", found, site.count(3000) + 30 + 1)


@workload(
    "files",
    "walk {size} files",
    group="scale",
    sizes=(1000, 10_000, 100_000, 1_000_000),
    lowers=["files-{size}"],
    inputs=["empty"],
    limit=240.0,
    rounds=1,
)
def files(site: Site) -> None:
    with site.clock:
        found = walk(site, site.mnt)
    if site.daemons():
        filled = site.memory()
        # Some have read the layers before anybody asked, so what is compared is a daemon that has nothing to read.
        site.mount(1, lowers=[site.input("empty")])
        idle = site.memory() - filled
        site.note("daemon bytes per inode", max(0, filled - idle) / found)
    site.check("files", found >= site.count(site.size), True)


@workload(
    "directory",
    "list and stat a directory of {size} entries",
    group="scale",
    sizes=(1000, 10_000, 100_000),
    lowers=["entries-{size}"],
    rounds=2,
)
def directory(site: Site) -> None:
    with site.clock:
        with os.scandir(site.mnt / "directory") as entries:
            found = sum(1 for entry in entries if entry.stat(follow_symlinks=False).st_size == 0)
    site.check("entries", found, site.count(site.size))


@workload(
    "mounts",
    "memory of {size} mounts of one image, 32 MiB read in each",
    group="scale",
    sizes=(1, 4, 16, 64),
    lowers=["programs"],
    unit="bytes",
    mounted=False,
    rounds=1,
    limit=120.0,
)
def mounts(site: Site) -> None:
    pages = read_into_cache(site.input("programs"))
    for mountpoint in [site.mount(number) for number in range(site.size)]:
        pages |= read_into_cache(mountpoint)
    daemons = site.memory()
    # What others on the machine use has no part in this sum, as it would have in the machine's free memory.
    site.record(daemons + sum(pages.values()))
    if site.peer.fuse:
        site.note("bytes of the daemons alone", daemons)
