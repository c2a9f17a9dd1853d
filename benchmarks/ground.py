"""Where measurements take place: the scratch directory, or the run's own ext4 for what makes and removes files.

ext4 without a journal, as many virtual machines have it, passes by each inode that was deleted in the last minutes on
its way to a free one (recently_deleted() in fs/ext4/ialloc.c). What a peer has deleted would be paid for by those that
are measured after it. With a journal it does not, and takes the same from the first round to the last.
"""

import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.inputs import MIB, Inputs, fingerprint
from benchmarks.site import abort_connections, detach_all
from benchmarks.workload import Workload

_SIZE: Final = 8192 * MIB
"""Of the filesystem; its image has holes for what was never written."""
# Nothing is left for the kernel to do in the background once it is mounted.
_MAKE: Final = ("mkfs.ext4", "-q", "-F", "-O", "has_journal", "-E", "lazy_itable_init=0,lazy_journal_init=0")


@dataclass(frozen=True, slots=True)
class Ground:
    """A directory for one measurement, and the inputs on the same filesystem."""

    base: Path
    inputs: Inputs
    disk: Path | None = None
    """The filesystem, where it is the run's own."""

    def settle(self) -> None:
        """Have what was written before on disk."""
        if self.disk is not None:
            subprocess.run(["sync", "--file-system", self.disk], check=True)


@contextmanager
def grounds(scratch: Path, inputs: Inputs, workloads: Iterable[Workload]) -> Iterator["Grounds"]:
    """The places for some workloads, whose inputs have been made; in the end nothing is mounted in `scratch`."""
    made = Grounds(scratch, inputs)
    try:
        made.prepare(workloads)
        yield made
    finally:
        abort_connections(scratch)
        detach_all(scratch)
        made.image.unlink(missing_ok=True)


class Grounds:
    """The places of a run."""

    def __init__(self, scratch: Path, inputs: Inputs) -> None:
        self._scratch = Ground(scratch / "site", inputs)
        self.image = scratch / "disk.ext4"
        disk = scratch / "disk"
        self._journal = Ground(disk / "site", Inputs(disk / "inputs", small=inputs.small), disk)
        self._layers: list[str] = []

    def prepare(self, workloads: Iterable[Workload]) -> None:
        """Make the filesystem and copy the inputs there, if any of the workloads wants it."""
        here = [one for one in workloads if one.filesystem == "journal"]
        if not here:
            return
        assert self._journal.disk is not None
        self._journal.disk.mkdir(exist_ok=True)
        with self.image.open("wb") as file:
            file.truncate(_SIZE)
        subprocess.run([*_MAKE, self.image], check=True)
        subprocess.run(["mount", "-o", "loop", self.image, self._journal.disk], check=True)
        self._layers = sorted({name for one in here for name in one.lowers or ("empty",)})
        for name in sorted({*self._layers, *(name for one in here for name in one.inputs)}):
            self._journal.inputs.copy(name, self._scratch.inputs)

    def of(self, workload: Workload) -> Ground:
        """Where a workload is measured."""
        return self._journal if workload.filesystem == "journal" else self._scratch

    def cooled(self) -> None:
        """The caches were dropped."""
        for ground in (self._scratch, self._journal):
            ground.inputs.cooled()

    def fingerprints(self) -> Sequence[str]:
        """What tells whether a copy of a layer was changed."""
        return [fingerprint(self._journal.inputs.path(name)) for name in self._layers]
