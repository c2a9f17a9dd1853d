"""What a workload is, and the register of all.

To add one, write a function in a module of workloads/ and decorate it with `workload`; nothing else has to change.
"""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from benchmarks.site import Site

Work = Callable[["Site"], None]
Filesystem = Literal["scratch", "journal", "ext4", "xfs"]


@dataclass(frozen=True, slots=True)
class Workload:
    """One thing to measure. A family is the same thing at several sizes, each a workload of its own."""

    name: str
    title: str
    group: str
    family: str
    size: int
    run: Work
    lowers: tuple[str, ...]
    """Inputs to lay below the mount, topmost first; an empty directory where there are none."""
    inputs: tuple[str, ...]
    """Further inputs that it uses."""
    tools: tuple[str, ...]
    """Debian packages that it needs."""
    unit: str
    limit: float
    """Seconds that one measurement may take, set-up included."""
    rounds: int
    """At most so many rounds."""
    cold: bool
    """It drops the caches, so that it runs after the others."""
    writes: bool
    """It writes, so that the floor needs a copy of the layers, and peers that differ in writing are measured."""
    mounted: bool
    """Whether the mount is made for it; otherwise it calls `site.mount`."""
    filesystem: Filesystem
    """Where the layers lie: in the scratch directory; on the run's own ext4, which has a journal, for what makes and
    removes files; or on a filesystem of its own. All but the first are on loop devices."""


WORKLOADS: Final[dict[str, Workload]] = {}


def workload(
    name: str,
    title: str,
    *,
    group: str,
    sizes: Sequence[int] = (),
    lowers: Sequence[str] = (),
    inputs: Sequence[str] = (),
    tools: Sequence[str] = (),
    unit: str = "s",
    limit: float = 60.0,
    rounds: int = 100,
    cold: bool = False,
    writes: bool = False,
    mounted: bool = True,
    filesystem: Filesystem = "scratch",
) -> Callable[[Work], Work]:
    """Register a function as a workload, or with `sizes` as a family of them; see Workload.

    The function gets a Site. What it does inside `with site.clock():` is measured, unless it calls `site.record`.
    `{size}` in its title and among its lowers becomes the size.
    """

    def register(run: Work) -> Work:
        for size in sizes or (0,):
            made = Workload(
                name=f"{name}-{size}" if sizes else name,
                title=title.format(size=f"{size:,}"),
                group=group,
                family=name if sizes else "",
                size=size,
                run=run,
                lowers=tuple(lower.format(size=size) for lower in lowers),
                inputs=tuple(inputs),
                tools=tuple(tools),
                unit=unit,
                limit=limit,
                rounds=rounds,
                cold=cold,
                writes=writes,
                mounted=mounted,
                filesystem=filesystem,
            )
            assert made.name not in WORKLOADS
            WORKLOADS[made.name] = made
        return run

    return register


class Unknown(Exception):
    """A name that no workload or peer has; the message lists those there are."""


def choose(wanted: Iterable[str]) -> list[Workload]:
    """The workloads whose name, family or group is among `wanted`, or matches it as a pattern; all for none.

    Raises Unknown.
    """
    chosen: set[str] = set()
    for pattern in wanted:
        found = {
            name
            for name, one in WORKLOADS.items()
            if pattern in (name, one.family, one.group) or fnmatch.fnmatchcase(name, pattern)
        }
        if not found:
            groups = ", ".join(sorted({one.group for one in WORKLOADS.values()}))
            names = ", ".join(dict.fromkeys(one.family or one.name for one in WORKLOADS.values()))
            raise Unknown(f"no workload is called {pattern}; there are {names}; groups {groups}")
        chosen |= found
    return [one for name, one in WORKLOADS.items() if name in chosen or not chosen]
