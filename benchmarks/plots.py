"""The plots of a run, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.peers import PEERS
from benchmarks.report import KERNEL
from benchmarks.results import Figure as Value
from benchmarks.results import Run
from benchmarks.workload import WORKLOADS

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

COLOURS = dict(
    zip(
        (peer.name for peer in PEERS),
        (pyplot.get_cmap("tab10")(index) for index in range(len(PEERS))),
        strict=True,
    )
)
TITLES = {peer.name: peer.title for peer in PEERS}


def draw(run: Run, folder: Path) -> list[Path]:
    """Draw one plot a group of workloads, and one a family; returns the files."""
    drawn = []
    singles: dict[str, list[str]] = {}
    families: dict[str, list[str]] = {}
    for name in WORKLOADS:
        if name in run.workloads():
            one = WORKLOADS[name]
            (families.setdefault(one.family, []) if one.family else singles.setdefault(one.group, [])).append(name)
    for group, names in singles.items() if len(run.peers()) > 1 else ():
        drawn.append(_bars(run, group, names, folder / f"{group}.png"))
    for family, names in families.items():
        one = WORKLOADS[names[0]]
        title = one.title.replace(f"{one.size:,}", "N", 1)
        points = {peer: [(name, run.figure(name, peer)) for name in names] for peer in run.peers()}
        drawn.append(_lines(title, one.unit, points, folder / f"{family}.png"))
        for note in dict.fromkeys(key for m in run.measurements if m.workload in names for key in m.outcome.notes):
            points = {peer: [(name, run.notes(name, peer, note)) for name in names] for peer in run.peers()}
            file = folder / f"{family}-{note.replace(' ', '-')}.png"
            drawn.append(_lines(f"{title}: {note}", "bytes", points, file))
    return drawn


def _bars(run: Run, group: str, names: Sequence[str], file: Path) -> Path:
    """How many times as long as the kernel's overlayfs each peer takes; a line shows the least and the greatest."""
    reference = KERNEL if KERNEL in run.peers() else run.peers()[0]
    peers = [peer for peer in run.peers() if peer != reference]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.3 * len(names) + 0.11 * len(names) * len(peers)))
    height = 0.8 / max(1, len(peers))
    for index, peer in enumerate(peers):
        for row, name in enumerate(names):
            position = row + (index - (len(peers) - 1) / 2) * height
            ratio = run.ratio(name, peer, reference)
            label = TITLES[peer] if row == 0 else None
            if ratio is None:
                why = "fails" if run.error(name, peer) else ""
                axes.text(1.02, position, why, fontsize=6, va="center", color=COLOURS[peer])
                axes.barh(position, 0, height=height, color=COLOURS[peer], label=label)
                continue
            axes.barh(position, ratio.median - 1, left=1, height=height, color=COLOURS[peer], label=label)
            axes.plot([ratio.least, ratio.greatest], [position, position], color="black", linewidth=0.7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(names)), [WORKLOADS[name].title for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"time, compared with {TITLES[reference]} (shorter is better)")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.9 / figure.get_figheight()), ncols=3)
    return _save(figure, file)


def _lines(title: str, unit: str, points: dict[str, list[tuple[str, Value | None]]], file: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(6.5, 4))
    for peer, found in points.items():
        known = [(WORKLOADS[name].size, value) for name, value in found if value is not None]
        if known:
            sizes, values = [size for size, _ in known], [value for _, value in known]
            medians = [value.median for value in values]
            below = [value.median - value.least for value in values]
            above = [value.greatest - value.median for value in values]
            axes.errorbar(
                sizes, medians, yerr=[below, above], label=TITLES[peer], color=COLOURS[peer], marker="o", capsize=2
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    names = next(iter(points.values()))
    axes.set_xticks([WORKLOADS[name].size for name, _ in names], [f"{WORKLOADS[name].size:,}" for name, _ in names])
    axes.minorticks_off()
    axes.set_title(title, fontsize=9)
    axes.set_ylabel("seconds" if unit == "s" else unit)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return _save(figure, file)


def _save(figure: Figure, file: Path) -> Path:
    figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    return file
