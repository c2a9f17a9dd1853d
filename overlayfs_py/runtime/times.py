"""Times for people."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

from overlayfs_py.runtime.errors import ContainerError

_PERIODS = (("year", 31536000), ("month", 2592000), ("week", 604800), ("day", 86400), ("hour", 3600), ("minute", 60))
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def isoformat(seconds: float | None) -> str:
    """Seconds since the epoch as Docker writes them; the year 1 for none."""
    if seconds is None:
        return "0001-01-01T00:00:00Z"
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def since(seconds: float | None) -> str:
    """How long it is since a time, in words."""
    passed = max(0.0, time.time() - (seconds or 0.0))
    for word, length in _PERIODS:
        if passed >= length:
            count = int(passed // length)
            return f"{count} {word}{'s' if count > 1 else ''}"
    count = int(passed)
    return f"{count} second{'' if count == 1 else 's'}"


def parse_moment(text: str) -> float:
    """Seconds since the epoch of a time of RFC 3339, a Unix time, or an age such as 10m. Raises ContainerError."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if match is not None and any(match.groups()):
        ages = zip(match.groups(), ("d", "h", "m", "s"), strict=True)
        return time.time() - sum(int(count) * _SECONDS[unit] for count, unit in ages if count)
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ContainerError(f"{text!r} is no time: write 2026-01-31T12:00:00Z, or an age such as 10m") from None
    return moment.timestamp()
