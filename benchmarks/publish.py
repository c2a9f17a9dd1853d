"""The results in the README: the table and the plots, between two marks."""

from pathlib import Path
from typing import Final

from benchmarks.peers import ROOT
from benchmarks.report import table
from benchmarks.results import Run

RESULTS: Final = ROOT / "benchmarks/results"
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
    plots = [f"![{file.stem}](benchmarks/results/{file.name})" for file in sorted(results.glob("*.png"))]
    return "\n".join([table(run), *plots]) + "\n"
