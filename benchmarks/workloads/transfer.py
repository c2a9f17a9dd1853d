"""fio: one file, sequential and random, read and written, in small and large blocks, by every way there is."""

import json
from typing import Final

from benchmarks.site import Site
from benchmarks.workload import Work, workload

_ENGINES: Final = {"buffered": "sync", "mmap": "mmap", "direct": "sync"}
_BLOCKS: Final = {"4k": 16, "1m": 128}
"""Block size → MiB that are read or written."""


def _fio(pattern: str, operation: str, block: str, way: str) -> Work:
    def run(site: Site) -> None:
        file = site.mnt / ("blocks" if operation == "read" else "written")
        options = [
            "--name=job",
            "--output-format=json",
            "--fallocate=none",
            "--randseed=1",
            "--thread",
            # Both make its start quicker.
            "--disk_util=0",
            "--clocksource=clock_gettime",
            f"--filename={file}",
            f"--rw={operation if pattern == 'seq' else 'rand' + operation}",
            f"--bs={block}",
            f"--size={site.count(_BLOCKS[block])}M",
            f"--ioengine={_ENGINES[way]}",
            f"--direct={int(way == 'direct')}",
            # Otherwise fio empties the cache of the file first.
            f"--invalidate={int(way == 'direct')}",
        ]
        with site.clock:
            printed = site.run("fio", *options)
        job = json.loads(printed)["jobs"][0]
        site.check("error", job["error"], 0)
        counted = job[operation]
        # fio's own start takes longer than some of these; this is the time that its client waited.
        site.record(counted["lat_ns"]["mean"] * counted["total_ios"] / 1e9)

    return run


def _register() -> None:
    for way in _ENGINES:
        for block, size in _BLOCKS.items():
            for operation in ("read", "write"):
                for pattern in ("seq", "rand"):
                    workload(
                        f"fio-{way}-{block}-{operation}-{pattern}",
                        f"{way}, {operation} {size} MiB {'in sequence' if pattern == 'seq' else 'at random'}, {block}",
                        group="fio",
                        tools=["fio"],
                        lowers=["blocks"] if operation == "read" else [],
                        writes=operation == "write",
                    )(_fio(pattern, operation, block, way))


_register()
