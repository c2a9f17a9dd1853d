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


@workload("stat-user", "stat 10,000 paths once more, as nobody", group="names", lowers=["debian"])
def stat_user(site: Site) -> None:
    source = site.input("debian")
    paths = sorted(path.relative_to(source) for path in (source / "usr").rglob("*"))[: site.count(10_000)]
    listed = site.base / "paths"
    listed.write_bytes(b"".join(os.fsencode(path) + b"\0" for path in paths))
    # The list is opened by root, and so is the directory in which all paths begin: nobody may not come this far.
    command = 'exec setpriv --reuid=65534 --regid=65534 --clear-groups xargs -0 stat --format=%s -- <"$0"'
    for _ in range(2):
        site.run("sh", "-c", command, listed, cwd=site.mnt)
    with site.clock:
        found = site.run("sh", "-c", command, listed, cwd=site.mnt)
    site.check("paths", found.count("\n"), len(paths))


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
