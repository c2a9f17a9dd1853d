"""The workloads, one function each; importing this registers them all, in the order of the report."""

from benchmarks.workloads import (  # noqa: I001 - the order is that of the report
    starting,
    names,
    reading,
    trees,
    programs,
    databases,
    transfer,
    copy_up,
    clients,
    scale,
)

__all__ = [
    "clients",
    "copy_up",
    "databases",
    "names",
    "programs",
    "reading",
    "scale",
    "starting",
    "transfer",
    "trees",
]
