"""Whether layers can have the owners that their archives tell."""

from __future__ import annotations

from pathlib import Path


def mapped(table: str, number: int) -> bool:
    """Whether an id is one in this process's user namespace; `table` is uid_map or gid_map. user_namespaces(7)."""
    return any(first <= number < first + count for first, count in _ranges(table))


def has_one_id() -> bool:
    """Whether the user namespace has only one user or only one group: then all files are theirs."""
    return any(sum(count for _, count in _ranges(table)) == 1 for table in ("uid_map", "gid_map"))


def _ranges(table: str) -> list[tuple[int, int]]:
    lines = Path("/proc/self", table).read_text().splitlines()
    return [(int(first), int(count)) for first, _, count in (line.split() for line in lines)]
