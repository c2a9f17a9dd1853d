"""The results of a run: what was measured, and medians, spreads and ratios of it.

Machines are shared and noisy, so a ratio is taken within each round, between two peers measured one right after the
other, and the median of these is told, with how wide they were.
"""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS
from benchmarks.site import Outcome


@dataclass(frozen=True, slots=True)
class Measurement:
    workload: str
    peer: str
    round: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Machine:
    kernel: str
    system: str
    processors: int
    memory: int
    """Bytes."""
    python: str
    load_before: float
    """Processes that ran or waited in the last minute."""


@dataclass(slots=True)
class Run:
    date: str
    only: list[str]
    """The workloads that were asked for; nothing for all."""
    machine: Machine
    versions: dict[str, str]
    missing: dict[str, str]
    """Peers that could not be installed, and why."""
    measurements: list[Measurement] = field(default_factory=list)
    seconds: float = 0.0
    load_after: float = 0.0

    def values(self, workload: str, peer: str) -> dict[int, float]:
        """What was measured, by round."""
        return {
            one.round: one.outcome.value
            for one in self.measurements
            if (one.workload, one.peer) == (workload, peer) and one.outcome.value is not None
        }

    def error(self, workload: str, peer: str) -> str | None:
        """Why a workload failed on a peer, or None."""
        errors = (one.outcome.error for one in self.measurements if (one.workload, one.peer) == (workload, peer))
        return next((error for error in errors if error is not None), None)

    def figure(self, workload: str, peer: str) -> "Figure | None":
        """The values of all rounds; None when there are none, or it failed in one."""
        values = list(self.values(workload, peer).values())
        return Figure.of(values) if values and self.error(workload, peer) is None else None

    def ratio(self, workload: str, peer: str, other: str) -> "Figure | None":
        """How many times as long a peer takes as another one."""
        if self.figure(workload, peer) is None or self.figure(workload, other) is None:
            return None
        mine, theirs = self.values(workload, peer), self.values(workload, other)
        return Figure.of([mine[number] / max(theirs[number], 1e-9) for number in mine if number in theirs])

    def notes(self, workload: str, peer: str, name: str) -> "Figure | None":
        """The side results of a name."""
        found = [
            one.outcome.notes[name]
            for one in self.measurements
            if (one.workload, one.peer) == (workload, peer) and name in one.outcome.notes
        ]
        return Figure.of(found) if found else None

    def best_fuse(self, workload: str) -> str | None:
        """The FUSE peer, not of ours, that is the fastest at a workload."""
        medians = {
            peer.name: figure.median
            for peer in PEERS
            if peer.fuse and not peer.ours and (figure := self.figure(workload, peer.name)) is not None
        }
        return min(medians, key=lambda name: medians[name]) if medians else None

    def workloads(self) -> list[str]:
        return list(dict.fromkeys(one.workload for one in self.measurements))

    def peers(self) -> list[str]:
        return list(self.versions)

    def failures(self) -> dict[tuple[str, str], str]:
        """(workload, peer) → why."""
        found = {}
        for one in self.measurements:
            if one.outcome.error is not None:
                found[one.workload, one.peer] = one.outcome.error
        return found

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> "Run":
        read: dict[str, Any] = json.loads(path.read_text())
        measured = [Measurement(**{**one, "outcome": Outcome(**one["outcome"])}) for one in read["measurements"]]
        return Run(**{**read, "machine": Machine(**read["machine"]), "measurements": measured})


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of some values, and the least and greatest of them."""

    median: float
    least: float
    greatest: float
    count: int

    @staticmethod
    def of(values: list[float]) -> "Figure":
        return Figure(statistics.median(values), min(values), max(values), len(values))

    @property
    def spread(self) -> float:
        """Half of what lies between the extremes, as a part of the median."""
        return (self.greatest - self.least) / 2 / self.median if self.median else 0.0
