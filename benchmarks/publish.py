"""The results in the README: the table and the plots, between two marks."""

from pathlib import Path
from typing import Final

from benchmarks.peers import ROOT
from benchmarks.report import about, failures, side_results, table
from benchmarks.results import Run
from benchmarks.workload import WORKLOADS

RESULTS: Final = ROOT / "benchmarks/results"
# Many rows, for which the README has a fold.
_FOLDED: Final = ("fio", "clients", "scale")
README: Final = ROOT / "README.md"
BEGIN: Final = "<!-- Written by python -m benchmarks publish, up to the next such mark. -->"
END: Final = "<!-- The end of what is written so. -->"


def publish(run: Run, readme: Path = README, results: Path = RESULTS) -> None:
    """Put a run into the README, in place of the one before. Raises ValueError where the marks are missing."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no place for the results")
    readme.write_text(f"{before}{begin}\n\n{section(run, results)}\n{end}{after}")


def section(run: Run, results: Path) -> str:
    """The Markdown for a run, its plots included."""
    folded = [name for name in run.workloads() if WORKLOADS[name].group in _FOLDED]
    shown = [name for name in run.workloads() if name not in folded]
    plots = {file.stem: f"![{file.stem}](benchmarks/results/{file.name})" for file in sorted(results.glob("*.png"))}
    groups = {WORKLOADS[name].group for name in shown}
    parts = [about(run), table(run, shown), "\n".join(plots[name] for name in plots if name in groups)]
    if folded:
        inside = [table(run, folded), side_results(run), "\n".join(plots[name] for name in plots if name not in groups)]
        parts.append("<details><summary>Single files, parallel clients, and scale</summary>")
        parts += [*inside, "</details>"]
    return "\n\n".join(part for part in [*parts, failures(run)] if part) + "\n"
