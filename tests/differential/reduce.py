"""The shortest script that still shows a difference."""

import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tests.differential.pair import Finding, run
from tests.differential.script import Script
from tests.differential.side import Mounter
from tests.support.mounts import MountFailed
from tests.support.trees import Stack

T = TypeVar("T")


def reduced(
    script: Script, finding: Finding, scratch: Path, second: Mounter | None, limit: float
) -> tuple[Script, Finding]:
    """A shorter script with a finding of the same signature."""
    best = finding
    steps_only = finding.stage in ("result", "afterwards")

    def still_fails(shorter: Script) -> bool:
        nonlocal best
        base = scratch / "reduce"
        try:
            found = run(shorter, base, second, steps_only=steps_only)
        except (OSError, MountFailed):
            # Without some of its nodes a stack may be impossible to build.
            return False
        finally:
            shutil.rmtree(base, ignore_errors=True)
        if found is None or found.signature != finding.signature:
            return False
        best = found
        return True

    return reduce(script, finding.failed, still_fails, limit), best


def reduce(script: Script, needless: Collection[int], still_fails: Callable[[Script], bool], limit: float) -> Script:
    """Drop steps, then nodes of layers, as long as `still_fails` says so, for at most `limit` seconds.

    The steps with the numbers in `needless` are tried first, all at once.
    """
    deadline = time.monotonic() + limit
    shorter = replace(script, steps=tuple(step for at, step in enumerate(script.steps) if at not in needless))
    if still_fails(shorter):
        script = shorter
    steps = _fewer(script.steps, lambda steps: still_fails(replace(script, steps=tuple(steps))), deadline)
    script = replace(script, steps=tuple(steps))
    nodes = [(number, node) for number, layer in enumerate(script.stack) for node in layer]
    nodes = _fewer(nodes, lambda kept: still_fails(replace(script, stack=_stack(kept, len(script.stack)))), deadline)
    script = replace(script, stack=_stack(nodes, len(script.stack)))
    layers = _fewer(script.stack, lambda kept: bool(kept) and still_fails(replace(script, stack=tuple(kept))), deadline)
    return replace(script, stack=tuple(layers))


def _stack(nodes: Sequence[tuple[int, object]], height: int) -> Stack:
    return tuple(tuple(node for at, node in nodes if at == number) for number in range(height))  # type: ignore[misc]


def _fewer(items: Sequence[T], fails: Callable[[list[T]], bool], deadline: float) -> list[T]:
    """Drop runs of items, halving their length down to one, until none can go."""
    kept = list(items)
    run = max(1, len(kept) // 2)
    while kept and time.monotonic() < deadline:
        dropped = False
        at = len(kept)
        while at > 0 and time.monotonic() < deadline:
            start = max(0, at - run)
            shorter = kept[:start] + kept[at:]
            if fails(shorter):
                kept = shorter
                dropped = True
            at = start
        if run == 1 and not dropped:
            break
        run = max(1, run // 2)
    return kept
