"""The ledger: one line of JSON for each run that landed, so that a slow-down is seen."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.peers import PEERS
from benchmarks.report import KERNEL, times
from benchmarks.results import Run

LEDGER: Final = Path(__file__).with_name("ledger.jsonl")
_TOLERANCE: Final = 1.15
"""How many times as slow as before is not told, beside the spread of both runs."""


def entry(run: Run) -> dict[str, Any]:
    """A run in one line: the ratios of ours to the kernel and to the best FUSE peer, each with least and greatest."""
    ours = [peer.name for peer in PEERS if peer.ours and peer.name in run.peers()]
    ratios: dict[str, dict[str, Any]] = {}
    for workload in run.workloads():
        best = run.best_fuse(workload)
        for peer in ours:
            found: dict[str, Any] = {"error": run.error(workload, peer)} if run.error(workload, peer) else {}
            for name, other in (("kernel", KERNEL), ("best_fuse", best)):
                ratio = run.ratio(workload, peer, other) if other else None
                if ratio is not None:
                    found[name] = [round(value, 3) for value in (ratio.median, ratio.least, ratio.greatest)]
            ratios.setdefault(peer, {})[workload] = found
    return {
        "date": run.date,
        # what was measured, whatever has been committed since
        "commit": next((run.versions[name] for name in ours), None),
        "kernel": run.machine.kernel,
        "versions": run.versions,
        "ratios": ratios,
    }


def append(run: Run, ledger: Path = LEDGER) -> list[str]:
    """Add a run; returns what has become slower since the one before, in words."""
    new = entry(run)
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    slower = list(_slower(json.loads(lines[-1]), new)) if lines else []
    ledger.write_text("\n".join([*lines, json.dumps(new, sort_keys=True)]) + "\n")
    return slower


def _slower(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Where even the least ratio of now is above the greatest of before."""
    for peer, workloads in new["ratios"].items():
        for workload, now in workloads.items():
            before = old["ratios"].get(peer, {}).get(workload, {})
            if "error" in now and "error" not in before and before:
                yield f"{workload} on {peer} fails now: {now['error']}"
            if "kernel" in now and "kernel" in before and now["kernel"][1] > before["kernel"][2] * _TOLERANCE:
                was, is_now = before["kernel"][0], now["kernel"][0]
                yield f"{workload} on {peer} took {times(was)} as long as the kernel's, and takes {times(is_now)} now"
