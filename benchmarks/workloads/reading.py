"""Reading: all files of /usr in a Debian root."""

from benchmarks.inputs import read_all
from benchmarks.site import Site
from benchmarks.workload import workload


@workload("read", "read all of /usr", group="reading", lowers=["debian"])
def read(site: Site) -> None:
    with site.clock:
        found = read_all(site.mnt / "usr")
    site.check("files and bytes", found, read_all(site.input("debian") / "usr"))


@workload("read-again", "read it once more", group="reading", lowers=["debian"])
def read_again(site: Site) -> None:
    read_all(site.mnt / "usr")
    with site.clock:
        read_all(site.mnt / "usr")


@workload("read-cold", "read it, layers not in the page cache", group="reading", lowers=["debian"], cold=True)
def read_cold(site: Site) -> None:
    site.drop_caches()
    with site.clock:
        read_all(site.mnt / "usr")
