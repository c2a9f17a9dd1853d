"""Names and attributes: walks, and look-ups of what is not there."""

import os
from pathlib import Path

from benchmarks.site import Site
from benchmarks.workload import workload


def walk(site: Site, root: Path) -> int:
    """stat everything below a directory; returns how many there are."""
    return site.run("find", root, "-printf", "%s\\n").count("\n")


@workload("walk", "walk and stat a Debian root", group="names", lowers=["debian"])
def walk_warm(site: Site) -> None:
    with site.clock:
        found = walk(site, site.mnt)
    site.check("entries", found, walk(site, site.input("debian")))


@workload("walk-again", "walk it once more", group="names", lowers=["debian"])
def walk_again(site: Site) -> None:
    walk(site, site.mnt)
    with site.clock:
        walk(site, site.mnt)


@workload("walk-cold", "walk it, layers not in the page cache", group="names", lowers=["debian"], cold=True)
def walk_cold(site: Site) -> None:
    site.drop_caches()
    with site.clock:
        walk(site, site.mnt)


def _look_up(root: Path, names: list[str]) -> None:
    folder = os.open(root, os.O_PATH)
    for name in names:
        try:
            os.stat(name, dir_fd=folder)
        except FileNotFoundError:
            continue
        raise AssertionError(f"{name} is there")


@workload("missing", "look up 10,000 missing names", group="names", lowers=["debian"])
def missing(site: Site) -> None:
    names = [f"usr/missing{number}" for number in range(site.count(10_000))]
    with site.clock:
        _look_up(site.mnt, names)


@workload("missing-again", "look them up 10 × more", group="names", lowers=["debian"])
def missing_again(site: Site) -> None:
    names = [f"usr/missing{number}" for number in range(site.count(10_000))]
    _look_up(site.mnt, names)
    with site.clock:
        _look_up(site.mnt, names * 10)
