"""Copy-up: the first byte written to a large lower file, on filesystems that can and can't share blocks."""

import os

from benchmarks.inputs import MIB, read_all
from benchmarks.site import Site
from benchmarks.workload import workload


def _first_write(site: Site) -> None:
    file = site.mnt / "big"
    size = os.stat(file).st_size
    read_all(site.base / "disk/layer/big")
    with site.clock:
        descriptor = os.open(file, os.O_RDWR)
        os.pwrite(descriptor, b"x", MIB)
        os.close(descriptor)
    with file.open("rb") as changed:
        site.check("size", os.fstat(changed.fileno()).st_size, size)
        changed.seek(MIB)
        site.check("byte", changed.read(1), b"x")


@workload(
    "first-write-ext4",
    "first write to a lower file of 1 GiB, ext4",
    group="copy-up",
    inputs=["image-ext4"],
    filesystem="ext4",
    writes=True,
    limit=120.0,
    rounds=2,
)
def first_write_ext4(site: Site) -> None:
    _first_write(site)


@workload(
    "first-write-xfs",
    "first write to a lower file of 1 GiB, xfs with reflink",
    group="copy-up",
    inputs=["image-xfs"],
    filesystem="xfs",
    writes=True,
    limit=120.0,
    rounds=2,
)
def first_write_xfs(site: Site) -> None:
    _first_write(site)
