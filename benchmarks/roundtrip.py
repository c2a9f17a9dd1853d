"""What no FUSE daemon can do without: a round trip to one that does nothing, on this machine."""

import subprocess
import tempfile
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).with_suffix(".c")
_LIMIT: Final = 120.0  # seconds


def round_trip(scratch: Path, count: int = 20_000) -> tuple[float, float]:
    """Microseconds of a look-up that finds nothing, as the machine is and with its processors kept awake.

    The least of five rounds of `count` look-ups. Raises CalledProcessError where it can't be compiled or run.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        program, mountpoint = Path(place, "roundtrip"), Path(place, "mnt")
        mountpoint.mkdir()
        subprocess.run(["cc", "-O2", "-Wall", "-o", str(program), str(_SOURCE)], check=True, timeout=_LIMIT)
        command = [str(program), str(mountpoint), str(count)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=_LIMIT)
    as_it_is, awake = map(float, done.stdout.split())
    return as_it_is, awake
