"""Trees of small files: unpack, delete, change, copy."""

import os
from pathlib import Path

from benchmarks.inputs import tree_files
from benchmarks.site import Site
from benchmarks.workload import workload

_OWNER = 1234


def _files(root: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(root))


def _unpack(site: Site) -> None:
    site.run("tar", "--extract", "--file", site.input("tree-tar"), "--directory", site.mnt)


@workload("untar", "unpack 4,000 small files", group="trees", inputs=["tree-tar"], writes=True, filesystem="journal")
def untar(site: Site) -> None:
    with site.clock:
        _unpack(site)
    site.check("files", _files(site.mnt / "tree"), tree_files(site.inputs))


@workload("delete", "delete them again", group="trees", inputs=["tree-tar"], writes=True, filesystem="journal")
def delete(site: Site) -> None:
    _unpack(site)
    with site.clock:
        site.run("rm", "-rf", site.mnt / "tree")
    site.check("left over", os.listdir(site.mnt), [])


@workload(
    "rm-lower",
    "rm -rf of a lower tree of 4,000 files",
    group="trees",
    lowers=["tree"],
    writes=True,
    filesystem="journal",
)
def rm_lower(site: Site) -> None:
    with site.clock:
        site.run("rm", "-rf", site.mnt / "tree")
    site.check("still there", (site.mnt / "tree").exists(), False)


@workload(
    "chown-lower",
    "chown -R of a lower tree of 4,000 files",
    group="trees",
    lowers=["tree"],
    writes=True,
    filesystem="journal",
)
def chown_lower(site: Site) -> None:
    with site.clock:
        site.run("chown", "-R", f"{_OWNER}:{_OWNER}", site.mnt / "tree")
    owned = site.run("find", site.mnt / "tree", "-uid", str(_OWNER), "-type", "f").count("\n")
    site.check("files that changed their owner", owned, tree_files(site.inputs))


@workload(
    "cp", "cp -a of a lower tree of 4,000 files", group="trees", lowers=["tree"], writes=True, filesystem="journal"
)
def cp(site: Site) -> None:
    with site.clock:
        site.run("cp", "-a", site.mnt / "tree", site.mnt / "copy")
    site.run("diff", "-r", site.mnt / "tree", site.mnt / "copy")
