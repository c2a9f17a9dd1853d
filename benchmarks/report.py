"""The Markdown table of a run."""

import math
from collections.abc import Collection
from typing import Final

from benchmarks.peers import PEERS
from benchmarks.results import Figure, Run
from benchmarks.workload import WORKLOADS

KERNEL: Final = "kernel"
_OURS: Final = {peer.name for peer in PEERS if peer.ours}


def report(run: Run) -> str:
    """What was run, one row a workload, and what failed."""
    parts = [about(run), table(run, run.workloads()), failures(run), side_results(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(run: Run, workloads: Collection[str]) -> str:
    peers = run.peers()
    titles = {peer.name: peer.title for peer in PEERS}
    head = ["workload", *(titles[peer] for peer in peers)]
    rows = [head, ["---", *("---:" for _ in head[1:])]]
    for name in WORKLOADS:
        if name in workloads:
            rows.append([f"{WORKLOADS[name].title} (`{name}`)", *(_cell(run, name, peer) for peer in peers)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def failures(run: Run) -> str:
    titles = {peer.name: peer.title for peer in PEERS}
    lines = [f"- {peer} is missing: {why}" for peer, why in run.missing.items()]
    lines += [f"- `{name}` on {titles[peer]}: {_one_line(why)}" for (name, peer), why in run.failures().items()]
    return "\n".join(["What failed:", "", *lines]) if lines else ""


def about(run: Run) -> str:
    machine = run.machine
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items() if name not in ("ext4", KERNEL))
    counts = [len({one.round for one in run.measurements if one.workload == name}) for name in run.workloads()]
    rounds = f"{min(counts, default=0)} to {max(counts, default=0)}"
    return (
        f"{run.date[:10]}, kernel {machine.kernel}, {machine.system}, {machine.processors} processors, "
        f"{machine.memory / 2**30:.0f} GiB; {versions}; Python {machine.python}. {rounds} rounds in "
        f"{run.seconds / 60:.0f} minutes; load {machine.load_before:.1f} before.\n\n"
        "Each cell: the median; in brackets how many times as long it takes as the kernel's overlayfs, and ± half of "
        "what lies between the least and the greatest of these ratios; for ours, after the semicolon, the same "
        "compared with whichever FUSE peer is the fastest at that workload, in bold where ours is faster."
    )


def _cell(run: Run, workload: str, peer: str) -> str:
    figure = run.figure(workload, peer)
    if figure is None:
        return "fails" if run.error(workload, peer) else "–"
    shown = amount(figure.median, WORKLOADS[workload].unit)
    ratio = run.ratio(workload, peer, KERNEL)
    if peer == KERNEL or ratio is None:
        return f"{shown}{width(figure)}"
    best = run.best_fuse(workload) if peer in _OURS else None
    against = run.ratio(workload, peer, best) if best else None
    if against is None:
        return f"{shown} ({times(ratio.median)}{width(ratio)})"
    second = f"{times(against.median)}{width(against)}"
    return f"{shown} ({times(ratio.median)}{width(ratio)}; {f'**{second}**' if against.median < 1 else second})"


def side_results(run: Run) -> str:
    names = dict.fromkeys(name for one in run.measurements for name in one.outcome.notes)
    lines = []
    for name in names:
        for workload in run.workloads():
            found = {peer: note for peer in run.peers() if (note := run.notes(workload, peer, name)) is not None}
            if found:
                shown = ", ".join(f"{peer} {quantity(note.median)}" for peer, note in found.items())
                lines.append(f"- `{workload}`, {name}: {shown}")
    return "\n".join(lines)


def amount(value: float, unit: str) -> str:
    """A value with its unit, to three digits."""
    if unit == "bytes":
        return f"{quantity(value)}B"
    for factor, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{digits(value / factor)} {name}"
    return f"{value * 1e9:.0f} ns"


def quantity(value: float) -> str:
    for factor, name in ((2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
        if value >= factor:
            return f"{digits(value / factor)} {name}"
    return f"{value:.0f} "


def digits(value: float) -> str:
    """Three digits, but no less than the units."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if 0 < value < 1000 else f"{value:.0f}"


def times(ratio: float) -> str:
    return f"{digits(ratio)} ×"


def width(figure: Figure) -> str:
    """How wide the values were, where there are several."""
    return f" ± {figure.spread:.0%}" if figure.count > 1 else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
