"""What the whole machine has cached of names: having it forgotten, and telling whether somebody else had."""

from pathlib import Path
from typing import Final

_DROP: Final = Path("/proc/sys/vm/drop_caches")
_COUNTS: Final = Path("/proc/vmstat")


def drop_names() -> None:
    """Have the kernel forget names that nobody uses, those it knows to be missing, too, and their inodes."""
    _DROP.write_text("2")


def times_emptied() -> str:
    """How often somebody on this machine has had the kernel forget the names that it knows."""
    (line,) = [line for line in _COUNTS.read_text().splitlines() if line.startswith("drop_slab ")]
    return line
